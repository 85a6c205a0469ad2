"""A few tokens at a time: everything that does not wait for the state in one call, one fused step a token for the rest.

The backward pass recomputes each chunk's states from the one kept at its start, so that memory is
``O(T D + T D N / C)``. It is written out because autograd would keep several ``[B, T, D, N]`` tensors. To torch.compile
the scan is one operator: traced, its loop would be a graph of several nodes a token, which take minutes to compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import over_sequences
from seqarch.ops.native.custom_op import Formula, Saved, define
from seqarch.ops.selective_scan import recurrent_torch
from seqarch.ops.selective_scan.pointwise import skip_and_gate, step_size, written

CHUNK_ELEMENTS = 2**18
"""Numbers in one chunk's states: with their decays and gradients they should stay in a core's cache."""

LEAST = 8
"""Tokens of the shortest chunk, however large the states: one state a chunk is kept for the backward pass."""


def run(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    scale_input: bool,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    wide = state.dtype
    delta = step_size(dt, dt_bias, dt_softplus, wide)
    rate = A.to(wide)

    def one(state: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        y, last, _ = scan(u, delta, B, C, rate, state)
        return y, last

    y, state = over_sequences(one, offsets, state, written(x, delta, scale_input), delta, B.to(wide), C.to(wide))
    return skip_and_gate(y, x, D, z), state


def _states(u: Tensor, delta: Tensor, B: Tensor, A: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states ``[C, B, D, N]`` of one chunk, into which B writes ``u``."""
    decay = torch.mul(delta.unsqueeze(-1), A).exp_()
    groups = B.shape[2]
    h = (u.unflatten(2, (groups, -1)).unsqueeze(-1) * B.unsqueeze(-2)).flatten(2, 3)
    before = start
    for t in range(h.shape[0]):
        before = h[t].addcmul_(decay[t], before)
    return decay, h


def _read(states: Tensor, vectors: Tensor) -> Tensor:
    """``[C, B, D, N]`` times ``[C, B, G, N]``: summed over N to ``[C, B, D]``."""
    groups = vectors.shape[2]
    return (states.unflatten(2, (groups, -1)) @ vectors.unsqueeze(-1)).squeeze(-1).flatten(2)


def _over_channels(states: Tensor, weights: Tensor, groups: int) -> Tensor:
    """``[C, B, D, N]`` times ``[C, B, D]``: summed over a group's channels to ``[C, B, G, N]``."""
    weights = weights.unflatten(2, (groups, -1)).unsqueeze(-2)
    return (weights @ states.unflatten(2, (groups, -1))).squeeze(-2)


def _chunk_size(state: Tensor) -> int:
    return max(LEAST, min(64, CHUNK_ELEMENTS // max(1, state.numel())))


def _time_first(*inputs: Tensor) -> list[Tensor]:
    """Each in the layout in which a token is one block; free for a batch of 1."""
    return [m.transpose(0, 1).contiguous() for m in inputs]


def _room(u: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for y, the last state and the state before each chunk."""
    chunks = -(-u.shape[1] // _chunk_size(state))
    return u.new_empty(u.shape), state.new_empty(state.shape), state.new_empty(chunks, *state.shape)


def forward(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``u, delta [B, T, D]``, ``B, C [B, T, G, N]``, ``A [D, N]``, ``state [B, D, N]`` to y, the last state and those
    before each chunk."""
    y, last, starts = _room(u, state)
    u, delta, B, C = _time_first(u, delta, B, C)
    size = _chunk_size(state)
    for chunk, start in enumerate(starts):
        part = slice(chunk * size, (chunk + 1) * size)
        start.copy_(state)
        _, h = _states(u[part], delta[part], B[part], A, state)
        y[:, part] = _read(h, C[part]).transpose(0, 1)
        state = h[-1]
    return y, last.copy_(state), starts


def backward(
    u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, starts: Tensor, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all that :func:`forward` takes."""
    du, ddelta, dB, dC, dA, carried = _gradients(u, delta, B, C, A, dlast)
    u, delta, B, C, dy = _time_first(u, delta, B, C, dy)
    dA.zero_()
    carried.copy_(dlast)
    size = _chunk_size(carried)
    for chunk in reversed(range(starts.shape[0])):
        part = slice(chunk * size, (chunk + 1) * size)
        decay, h = _states(u[part], delta[part], B[part], A, starts[chunk])
        dC[:, part] = _over_channels(h, dy[part], C.shape[2]).transpose(0, 1)
        g = _states_gradient(dy[part], C[part], decay, carried)
        torch.mul(decay[0], g[0], out=carried)
        through_decay = decay.mul_(g)
        through_decay[1:] *= h[:-1]
        through_decay[0] *= starts[chunk]
        dA += (through_decay * delta[part].unsqueeze(-1)).sum((0, 1))
        du[:, part] = _read(g, B[part]).transpose(0, 1)
        dB[:, part] = _over_channels(g, u[part], B.shape[2]).transpose(0, 1)
        ddelta[:, part] = through_decay.mul_(A).sum(-1).transpose(0, 1)
    return du, ddelta, dB, dC, dA, carried


def _gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(m.new_empty(m.shape) for m in inputs)


def _differentiate(call: Saved, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
    return scan_backward(*call.inputs[:-1], *call.kept, dy, dlast)


scan, scan_backward = define(
    "selective_scan_chunk", forward, backward, lambda u, delta, B, C, A, state: _room(u, state),
    lambda u, delta, B, C, A, starts, dy, dlast: _gradients(u, delta, B, C, A, dlast),
    Formula(_differentiate, recurrent_torch.scan, results=2, keeps=(2,)),
)  # fmt: skip


def _states_gradient(dy: Tensor, C: Tensor, decay: Tensor, carried: Tensor) -> Tensor:
    """The gradient ``[C, B, D, N]`` of each state of a chunk; ``carried`` is that of the state after its last token."""
    groups = C.shape[2]
    g = (dy.unflatten(2, (groups, -1)).unsqueeze(-1) * C.unsqueeze(-2)).flatten(2, 3)
    g[-1] += carried
    for t in reversed(range(g.shape[0] - 1)):
        g[t].addcmul_(decay[t + 1], g[t + 1])
    return g
