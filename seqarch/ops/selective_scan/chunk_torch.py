"""A few tokens at a time: all that does not wait for the state in one call, the rest in one fused step per token.

The backward pass recomputes each chunk's states from the one kept at its start, so that memory is
``O(T D + T D N / C)``. It is written out because autograd would keep several ``[B, T, D, N]`` tensors. To torch.compile
the scan is one operator: traced, its loop would be a graph of several nodes a token, which take minutes to compile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import join_sequences, sequences
from seqarch.ops.dispatch.inputs import Inputs
from seqarch.ops.native.custom_op import Operator, Upstream
from seqarch.ops.selective_scan import recurrent_torch
from seqarch.ops.selective_scan.inputs import SelectiveScanInputs
from seqarch.ops.selective_scan.pointwise import scaled_input, skip_and_gate, step_size

CHUNK_ELEMENTS = 2**18
"""Numbers in one chunk's states: with their decays and gradients they should stay in a core's cache."""

LEAST = 8
"""Tokens of the shortest chunk, however large the states: one state per chunk is kept for the backward pass."""


@dataclass(frozen=True)
class ScanInputs(Inputs):
    """The recurrence alone, of one sequence or several of one length, all in one dtype.

    Attributes:
        u: what B writes into the state, ``[B, T, D]``.
        delta: step sizes ``[B, T, D]``.
        B: ``[B, T, G, N]``.
        C: ``[B, T, G, N]``.
        A: ``[D, N]``.
        state: ``[B, D, N]``.
    """

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    state: Tensor


def run(inputs: SelectiveScanInputs) -> tuple[Tensor, Tensor]:
    dtype = inputs.state.dtype
    A, B, C = (m.to(dtype) for m in (inputs.A, inputs.B, inputs.C))
    delta = step_size(inputs)
    pieces = sequences(inputs.offsets, inputs.state, scaled_input(inputs, delta), delta, B, C)
    outputs, states, _ = zip(*[scan(ScanInputs(u, dt, B, C, A, h)) for h, u, dt, B, C in pieces], strict=True)
    return skip_and_gate(inputs, join_sequences(outputs, dim=1)), join_sequences(states, dim=0)


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


def _outputs(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and the state before each chunk, uninitialised."""
    u, state = inputs.u, inputs.state
    chunks = -(-u.shape[1] // _chunk_size(state))
    return u.new_empty(u.shape), state.new_empty(state.shape), state.new_empty(chunks, *state.shape)


def forward(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and those before each chunk."""
    A, state = inputs.A, inputs.state
    y, last, starts = _outputs(inputs)
    u, delta, B, C = _time_first(inputs.u, inputs.delta, inputs.B, inputs.C)
    size = _chunk_size(state)
    for chunk, start in enumerate(starts):
        part = slice(chunk * size, (chunk + 1) * size)
        start.copy_(state)
        _, h = _states(u[part], delta[part], B[part], A, state)
        y[:, part] = _read(h, C[part]).transpose(0, 1)
        state = h[-1]
    return y, last.copy_(state), starts


def backward(inputs: ScanInputs, upstream: Upstream) -> list[Tensor]:
    """The gradients of all inputs."""
    A, (starts,), (dy, dlast) = inputs.A, upstream.kept, upstream.gradients
    gradients = du, ddelta, dB, dC, dA, carried = _gradients(inputs, upstream)
    u, delta, B, C, dy = _time_first(inputs.u, inputs.delta, inputs.B, inputs.C, dy)
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
    return gradients


def _gradients(inputs: ScanInputs, upstream: Upstream) -> list[Tensor]:
    return [m.new_empty(m.shape) for m in inputs.values()]


def _plain(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    return recurrent_torch.scan(*inputs.values())


scan = Operator(
    "selective_scan_chunk", ScanInputs, forward, backward, _plain, _outputs, _gradients, results=2, keeps=(2,)
)


def _states_gradient(dy: Tensor, C: Tensor, decay: Tensor, carried: Tensor) -> Tensor:
    """The gradient ``[C, B, D, N]`` of each state of a chunk; ``carried`` is that of the state after its last token."""
    groups = C.shape[2]
    g = (dy.unflatten(2, (groups, -1)).unsqueeze(-1) * C.unsqueeze(-2)).flatten(2, 3)
    g[-1] += carried
    for t in reversed(range(g.shape[0] - 1)):
        g[t].addcmul_(decay[t + 1], g[t + 1])
    return g
