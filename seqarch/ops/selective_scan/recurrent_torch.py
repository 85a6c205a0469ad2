"""The reference: one step after the other, as the equation is written."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import over_sequences
from seqarch.ops.selective_scan.pointwise import skip_and_gate, step_size, written

TRANSFORMABLE = True


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

    def one(h: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        return scan(u, delta, B, C, rate, h)

    y, state = over_sequences(one, offsets, state, written(x, delta, scale_input), delta, B.to(wide), C.to(wide))
    return skip_and_gate(y, x, D, z), state


def scan(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """``u, delta [B, T, D]``, ``B, C [B, T, G, N]``, ``A [D, N]``, ``h [B, D, N]`` to y and the last state."""
    outputs, groups = [], B.shape[2]
    for t in range(u.shape[1]):
        write = u[:, t].unflatten(1, (groups, -1)).unsqueeze(-1) @ B[:, t].unsqueeze(-2)
        h = (delta[:, t].unsqueeze(-1) * A).exp() * h + write.flatten(1, 2)
        outputs.append((h.unflatten(1, (groups, -1)) @ C[:, t].unsqueeze(-1)).flatten(1))
    return torch.stack(outputs, dim=1) if outputs else u, h
