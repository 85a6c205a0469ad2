"""Positions of tokens in their own sequences, and the tokens before them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import sequence_offsets


def token_positions(
    before: Tensor, length: int, cu_seqlens: Tensor | Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Positions of the tokens of a call, and the number of tokens seen after it.

    Args:
        before: tokens seen before the call, ``[B]`` (one entry per sequence under ``cu_seqlens``), integer.
        length: T, the tokens of this call.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``.

    Returns:
        positions ``[B, T]`` and the count after the call, ``[B]``.
    """
    steps = torch.arange(length, device=before.device)
    if cu_seqlens is None:
        return before.unsqueeze(1) + steps, before + length
    boundaries = sequence_offsets("token_positions", cu_seqlens, 1, length)
    assert boundaries is not None
    lengths = torch.tensor([end - start for start, end in pairwise(boundaries)], device=before.device)
    starts = torch.tensor(boundaries[:-1], device=before.device)
    shift = (before - starts).repeat_interleave(lengths)
    return (shift + steps).unsqueeze(0), before + lengths


def block_of(positions: Tensor, size: int) -> Tensor:
    """The block of ``size`` tokens that each position lies in: ``positions // size``, as compiled code gets it right.

    By way of float64, exact below 2^53: from an integer division of counted positions, torch 2.13's CPU compiler makes
    loops that leave out an unfinished last block (``torch.compile(lambda: (torch.arange(40) // 16).clone())``).
    """
    return (positions.double() / size).floor().long()


def tokens_before(last: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The token before each of ``x: [B, T, ...]``, ``last: [B, ...]`` before the first; and the last of x."""
    joined = torch.cat([last.unsqueeze(1).to(x.dtype), x], dim=1)
    return joined[:, :-1], joined[:, -1]
