"""Rotary position embedding (Su et al. 2021, "RoFormer", section 3.2.2), in the half-split convention.

Channel i of the first half turns with channel i of the second half, as in GPT-NeoX, Llama and ``transformers``; the
paper's own pairs are neighbours (2i, 2i + 1). The two differ by a fixed permutation of the channels, so one trained
model is not the other's.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.native import fused


class Scaling(Protocol):
    """What changes frequencies, and the size of what is turned: :mod:`seqarch.layers.modules.rope_scaling`."""

    @property
    def amplitude(self) -> float: ...
    def frequencies(self, width: int, base: float, device: torch.device | None = None) -> Tensor: ...


def frequencies(width: int, base: float, device: torch.device | None = None) -> Tensor:
    """The angle per token of each pair of ``width`` K channels, ``base ** (-2 i / K)``: float64 ``[K / 2]``."""
    return base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)


def rotary_tables(
    positions: Tensor, width: int, base: float = 10000.0, scaling: Scaling | None = None
) -> tuple[Tensor, Tensor]:
    """The cosines and sines by which heads of an even ``width`` K turn: float64 ``[..., T, 1, K / 2]`` each.

    The angle of pair i at position p is ``p * base ** (-2 i / K)``. In float32 it would be off by 0.03 at a position of
    a million.

    Args:
        positions: ``[T]`` or ``[B, T]``, counted from 0.
        width: K.
        base: larger turns slower; 10000 in the paper.
        scaling: other frequencies, and cosines and sines times a number.

    Raises:
        ValueError: K is odd.
    """
    if width % 2:
        raise ValueError(f"rotary embedding turns pairs of channels: expected an even head width, got {width}")
    of = frequencies if scaling is None else scaling.frequencies
    angle = positions[..., None, None].double() * of(width, base, positions.device)
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if scaling is None else (cos * scaling.amplitude, sin * scaling.amplitude)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn ``x: [B, T, H, K]`` by :func:`rotary_tables`; computed in float32 or wider, returned in x's dtype.

    Tables of a smaller width turn that many of the first channels.
    """
    wide = accumulation_dtype(x)
    cos, sin = (table.to(wide).squeeze(-2) for table in tables)
    if cos.ndim == 3 and fused.serves(x, cos, sin):
        return fused.rotate(x, cos, sin)
    return fused.rotate_by_torch(x.to(wide), cos, sin).to(x.dtype)


def apply_rotary(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Turn ``x: [B, T, H, K]`` to its ``positions``, ``[T]`` or ``[B, T]``: then ``q_i . k_j`` knows only i - j."""
    return rotate(x, rotary_tables(positions, x.shape[-1], base))
