"""Where the numbers of one side of a rule lie in the other's tensors, for rules that only move numbers.

A rule is applied to tensors without memory: a result that is a view says by its strides where each number is from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqarch.interop.weights import Rule
from seqarch.ops.native.transpose import transpose_into
from seqarch.pretrained.sources import Source
from seqarch.pretrained.tensor_files import Span, StoredTensor

TILE = 2 << 20
"""Bytes that are read and then transposed: few enough for a cache, and many for one call."""

TILE_ROWS = 64
"""A tile has a multiple of so many rows, if that many fit, so that whole lines of the cache are written."""


@dataclass(frozen=True)
class Move:
    """Rows of a source that are one tensor of ours, as they are or each matrix transposed.

    Attributes:
        source: ``[rows, columns]``, or of any shape where all of it is read as it is.
        out: ours, contiguous: the rows, or ``[matrices, columns, rows]``.
        first: the row where it begins.
        step: rows from one matrix to the next, where they are transposed.
    """

    source: Source
    out: Tensor
    first: int = 0
    step: int | None = None

    def span(self) -> Span | None:
        """Where its bytes stand in one file and are to stand in memory, if they need nothing else."""
        if self.step is not None or not isinstance(self.source, StoredTensor):
            return None
        return self.source.span(self.out, self.first)

    def run(self) -> None:
        """Read the rows to their place."""
        if self.step is None:
            self.source.read_into(self.out, self.first)
            return
        columns, dtype, rows = self.source.shape[1], self.source.dtype, self.out.shape[2]
        most = TILE // max(1, columns * dtype.itemsize)
        most = max(1, most // TILE_ROWS * TILE_ROWS or most)
        tile = torch.empty(min(rows, most), columns, dtype=dtype, device="cpu")
        for number, matrix in enumerate(self.out):
            for begin in range(0, rows, most):
                part = tile[: rows - begin]
                self.source.read_into(part, self.first + number * self.step + begin)
                transpose_into(part.to(matrix.device, matrix.dtype), matrix, begin, threads=1)


def moves(rule: Rule, theirs: Sequence[Source], made: Mapping[str, Tensor]) -> list[Move] | None:
    """How to read a rule's tensors to their places; ``None`` where it does more, or where shapes do not fit."""
    if any(step.gathers for step in rule.steps) or not all(each.shape and math.prod(each.shape) for each in theirs):
        return None
    try:
        return _into_parts(rule, theirs, made) if len(theirs) > 1 else _out_of_one(rule, theirs[0], made)
    except ValueError:  # of shapes, which is said of the tensors themselves
        return None


def _into_parts(rule: Rule, theirs: Sequence[Source], made: Mapping[str, Tensor]) -> list[Move] | None:
    """Each of theirs into a part of one of ours that lies side by side."""
    bare = {name: _without_memory(tensor.shape) for name, tensor in made.items()}
    parts, found = rule.to_theirs(bare), []
    for name, source in zip(rule.theirs, theirs, strict=True):
        part = parts[name]
        whole = next((own for own, each in bare.items() if _is_view(part, each)), None)
        if whole is None or part.shape != source.shape or not part.is_contiguous():
            return None
        begin = int(part.storage_offset())
        out = made[whole].view(-1)[begin : begin + part.numel()]
        found.append(Move(source.as_rows(), out.view(-1, source.shape[-1])))
    return found


def _out_of_one(rule: Rule, source: Source, made: Mapping[str, Tensor]) -> list[Move] | None:
    """Each of ours out of rows of theirs, side by side or transposed."""
    bare, rows, columns = _without_memory(source.shape), source.as_rows(), source.shape[-1]
    views, found = rule.to_ours({rule.theirs[0]: bare}), []
    for name, out in made.items():
        view = views[name]
        first, beside = divmod(int(view.storage_offset()), columns)
        step = view.stride(0) if view.ndim == 3 else 0
        if beside or not _is_view(view, bare) or view.shape != out.shape:
            return None
        if view.is_contiguous() and view.numel() % columns == 0:
            found.append(Move(rows, out.view(-1, columns), first))
        elif view.stride()[-2:] == (1, columns) and view.shape[-2] == columns and view.ndim < 4 and not step % columns:
            found.append(Move(rows, out.view(-1, *out.shape[-2:]), first, step // columns))
        else:
            return None
    return found


def _without_memory(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), device="meta")


def _is_view(tensor: Tensor, of: Tensor) -> bool:
    return tensor.untyped_storage()._cdata == of.untyped_storage()._cdata
