"""Packed sequences: run something on each, or cut them all into chunks of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def split_sequences(offsets: tuple[int, ...], *inputs: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Each packed sequence's part of the inputs ``[1, T, ...]``; ``None`` stays ``None``."""
    lengths = [end - start for start, end in pairwise(offsets)]
    # split, not slices: the backward pass joins the pieces once instead of adding full-length buffers
    nothing = [None] * len(lengths)
    return zip(*(nothing if tensor is None else tensor.split(lengths, dim=1) for tensor in inputs), strict=True)


def sequences(offsets: tuple[int, ...] | None, state: Tensor, *inputs: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Each packed sequence's row of the state ``[1, ...]`` and part of the inputs; all at once without offsets."""
    if offsets is None:
        yield (state, *inputs)
        return
    for row, pieces in zip(state.split(1), split_sequences(offsets, *inputs), strict=True):
        yield (row, *pieces)


def join_sequences(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """The inverse of :func:`sequences`."""
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), dim=dim)


def over_sequences(
    run: Callable[..., tuple[Tensor, Tensor]], offsets: tuple[int, ...] | None, state: Tensor, *inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``run(state, *inputs)`` on each packed sequence and its own state: outputs joined along time, states along rows.

    Args:
        offsets: boundaries of the sequences, or ``None`` to run once on everything.
        state: one row per sequence (one row per batch entry without ``offsets``).
        inputs: ``[1, T, ...]`` each, or ``None``, which is handed on.
    """
    outputs, states = zip(*[run(*pieces) for pieces in sequences(offsets, state, *inputs)], strict=True)
    return join_sequences(outputs, dim=1), join_sequences(states, dim=0)


class Chunks:
    """Cuts ``[B, T, ...]`` into ``[B, N, C, ...]``, each sequence padded with zeros to whole chunks of C tokens.

    Attributes:
        segments: for each sequence, the rows of the state that it owns and its chunks, both as slices.
    """

    def __init__(self, batch: int, length: int, size: int, offsets: tuple[int, ...] | None, device: torch.device):
        self.length, self.size = length, size
        if offsets is None:
            self._slots = None
            self.count = max(1, -(-length // size))
            self.segments = [(slice(0, batch), range(self.count))]
            return
        self.segments, slots, self.count = [], [], 0
        for row, (start, end) in enumerate(pairwise(offsets)):
            chunks = -(-(end - start) // size)
            first = self.count * size
            slots.append(torch.arange(first, first + end - start))
            self.segments.append((slice(row, row + 1), range(self.count, self.count + chunks)))
            self.count += chunks
        self.count = max(1, self.count)
        self._slots = torch.cat(slots).to(device)

    def split(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` to ``[B, N, C, ...]``."""
        padding = self.count * self.size - self.length
        if self._slots is not None:
            empty = x.new_zeros(x.shape[0], self.count * self.size, *x.shape[2:])
            x = empty.index_copy(1, self._slots, x)
        elif padding:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))
        return x.unflatten(1, (self.count, self.size))

    def join(self, x: Tensor) -> Tensor:
        """``[B, N, C, ...]`` back to ``[B, T, ...]``."""
        x = x.flatten(1, 2)
        return x[:, : self.length] if self._slots is None else x.index_select(1, self._slots)
