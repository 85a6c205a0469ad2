"""A few tokens at a time: everything that does not wait for the state in one call, one fused step a token for the rest.

The backward pass recomputes each chunk's states from the one kept at its start, so that memory is
``O(T D + T D N / C)``. It is written out because autograd would keep several ``[B, T, D, N]`` tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqarch.ops.common.packed import over_sequences
from seqarch.ops.selective_scan.pointwise import skip_and_gate, step_size

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
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    wide = state.dtype
    delta = step_size(dt, dt_bias, dt_softplus, wide)
    rate = A.to(wide)

    def one(state: Tensor, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        time_first = (m.transpose(0, 1).contiguous() for m in (x, delta, B, C))
        y, last = _Scan.apply(*time_first, rate, state)
        return y.transpose(0, 1), last

    y, state = over_sequences(one, offsets, state, x.to(wide), delta, B.to(wide), C.to(wide))
    return skip_and_gate(y, x, D, z), state


def _states(u: Tensor, delta: Tensor, B: Tensor, A: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states ``[C, B, D, N]`` of one chunk; ``u`` is ``delta x``."""
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


class _Scan(torch.autograd.Function):
    """``x, delta [T, B, D]``, ``B, C [T, B, G, N]``, ``A [D, N]``, ``state [B, D, N]`` to y and the last state."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = max(LEAST, min(64, CHUNK_ELEMENTS // max(1, state.numel())))
        outputs, starts = [], []
        for first in range(0, x.shape[0], size):
            part = slice(first, first + size)
            starts.append(state)
            _, h = _states(delta[part] * x[part], delta[part], B[part], A, state)
            outputs.append(_read(h, C[part]))
            state = h[-1].clone()
        ctx.size, ctx.chunks = size, len(starts)
        ctx.save_for_backward(x, delta, B, C, A, *starts)
        return torch.cat(outputs) if outputs else torch.zeros_like(x), state.clone() if not starts else state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, carried: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, B, C, A, *starts = ctx.saved_tensors
        dx, ddelta, dB, dC = (torch.empty_like(m) for m in (x, delta, B, C))
        dA = torch.zeros_like(A)
        for chunk in reversed(range(ctx.chunks)):
            part = slice(chunk * ctx.size, (chunk + 1) * ctx.size)
            u = delta[part] * x[part]
            decay, h = _states(u, delta[part], B[part], A, starts[chunk])
            dC[part] = _over_channels(h, dy[part], C.shape[2])
            g = _states_gradient(dy[part], C[part], decay, carried)
            carried = decay[0] * g[0]
            through_decay = decay.mul_(g)
            through_decay[1:] *= h[:-1]
            through_decay[0] *= starts[chunk]
            dA += (through_decay * delta[part].unsqueeze(-1)).sum((0, 1))
            du = _read(g, B[part])
            dB[part] = _over_channels(g, u, B.shape[2])
            dx[part] = du * delta[part]
            ddelta[part] = du * x[part] + through_decay.mul_(A).sum(-1)
        return dx, ddelta, dB, dC, dA, carried


def _states_gradient(dy: Tensor, C: Tensor, decay: Tensor, carried: Tensor) -> Tensor:
    """The gradient ``[C, B, D, N]`` of each state of a chunk; ``carried`` is that of the state after its last token."""
    groups = C.shape[2]
    g = (dy.unflatten(2, (groups, -1)).unsqueeze(-1) * C.unsqueeze(-2)).flatten(2, 3)
    g[-1] += carried
    for t in reversed(range(g.shape[0] - 1)):
        g[t].addcmul_(decay[t + 1], g[t + 1])
    return g
