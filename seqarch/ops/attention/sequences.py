"""Packed sequences of queries, keys and values, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def over_sequences(run: Callable[..., Tensor], offsets: tuple[int, ...] | None, *inputs: Tensor) -> Tensor:
    """``run(*inputs)`` on each packed sequence, joined along time; on everything at once without ``offsets``."""
    if offsets is None:
        return run(*inputs)
    lengths = [end - start for start, end in pairwise(offsets)]
    # split, not slices: the backward pass joins the pieces once instead of adding full-length buffers
    pieces = zip(*(tensor.split(lengths, dim=1) for tensor in inputs), strict=True)
    return torch.cat([run(*piece) for piece in pieces], dim=1)
