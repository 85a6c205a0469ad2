"""Numbers in memory as a tape sees them: a place, an offset, sizes and strides, of which some may change each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

Amount = Any
"""A whole number, or an expression of whole numbers of the state, which each token has values for."""


class Unserved(Exception):
    """What a layer does for one token has no instructions, and why."""


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory: a ``"value"`` of a tape, or a ``"lasting"`` one (``what`` is where it begins), a ``"parameter"`` (its
    address), a tensor of the ``"state"`` (its number), a ``"table"`` that torch makes for each token (its number), or a
    whole ``"number"`` of the state that each token has a value for (its place among those).
    """

    kind: str
    what: Any


@dataclass(frozen=True)
class View:
    """Numbers of a buffer, as a strided tensor is of its storage: of float32, of float64, of int64, which instructions
    read and write as float64, or of bfloat16, which some read and write as float32.
    """

    buffer: Buffer
    offset: Amount
    sizes: tuple[Amount, ...]
    strides: tuple[Amount, ...]
    dtype: torch.dtype = torch.float32

    @property
    def wide(self) -> bool:
        """Whether instructions compute with its numbers in float64."""
        return self.dtype in (torch.float64, torch.int64)

    @property
    def rank(self) -> int:
        return len(self.sizes)

    def laid(self, sizes: Sequence[Amount], strides: Sequence[Amount], offset: Amount = 0) -> View:
        """Other sizes and strides of the same numbers, from ``offset`` on."""
        return replace(self, offset=self.offset + offset, sizes=tuple(sizes), strides=tuple(strides))

    def part(self, dim: int, start: Amount, size: Amount, step: int = 1) -> View:
        """Every ``step``-th number from ``start`` on along a dimension."""
        sizes, strides = list(self.sizes), list(self.strides)
        sizes[dim], strides[dim] = size, strides[dim] * step
        return self.laid(sizes, strides, start * self.strides[dim])

    def without(self, dim: int, at: Amount = 0) -> View:
        """The numbers at a place along a dimension, which goes."""
        sizes, strides = list(self.sizes), list(self.strides)
        del sizes[dim], strides[dim]
        return self.laid(sizes, strides, at * self.strides[dim])

    def with_one(self, dim: int) -> View:
        """With a dimension of size 1 there."""
        return self.laid((*self.sizes[:dim], 1, *self.sizes[dim:]), (*self.strides[:dim], 0, *self.strides[dim:]))

    def permuted(self, order: Sequence[int]) -> View:
        return self.laid([self.sizes[d] for d in order], [self.strides[d] for d in order])

    def expanded(self, sizes: Sequence[Amount]) -> View:
        """Repeated along dimensions of size 1, and along new ones in front.

        Raises:
            Unserved: the sizes do not fit, which torch has refused before.
        """
        new = len(sizes) - self.rank
        strides: list[Amount] = [0] * new
        for own, stride, wanted in zip(self.sizes, self.strides, sizes[new:], strict=True):
            if own not in (1, wanted):
                raise Unserved(f"sizes {self.sizes} are repeated to {tuple(sizes)}")
            strides.append(stride if own == wanted else 0)
        return self.laid(sizes, strides)

    def reshaped(self, sizes: Sequence[Amount]) -> View | None:
        """The same numbers in their order with other sizes; ``None`` where that takes a copy."""
        if tuple(sizes) == self.sizes:
            return self
        strides = _strides_of_shape(self, sizes)
        return None if strides is None else self.laid(sizes, strides)

    def is_dense(self, dims: int) -> bool:
        """Whether the numbers of the last dimensions lie side by side."""
        first = self.rank - dims
        wanted = side_by_side(self.sizes[first:])
        pairs = zip(self.sizes[first:], wanted, self.strides[first:], strict=True)
        return all(size == 1 or step == own for size, step, own in pairs)


def side_by_side(sizes: Sequence[Amount]) -> tuple[Amount, ...]:
    """The strides of numbers without gaps."""
    strides: list[Amount] = []
    step: Amount = 1
    for size in reversed(sizes):
        strides.append(step)
        step = step * size
    return tuple(reversed(strides))


def fixed(sizes: Sequence[Amount]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def numel(sizes: Sequence[int]) -> int:
    return math.prod(sizes)


def merged(dims: Sequence[tuple[Amount, tuple[Amount, ...]]]) -> list[tuple[Amount, tuple[Amount, ...]]]:
    """Dimensions, each a size and its strides in several views, with neighbours as one where all views allow it."""
    found: list[tuple[Amount, tuple[Amount, ...]]] = []
    for size, strides in dims:
        if size == 1:
            continue
        if found and isinstance(size, int) and all(o == size * i for o, i in zip(found[-1][1], strides, strict=True)):
            found[-1] = (found[-1][0] * size, strides)
        else:
            found.append((size, strides))
    return found


def _strides_of_shape(view: View, sizes: Sequence[Amount]) -> list[Amount] | None:
    if not fixed([*view.sizes, *sizes]):
        own = [(size, stride) for size, stride in zip(view.sizes, view.strides, strict=True) if size != 1]
        if [size for size, _ in own] != [size for size in sizes if size != 1]:
            raise Unserved("numbers whose count changes from token to token are given another shape")
        kept = iter(own)
        return [0 if size == 1 else next(kept)[1] for size in sizes]
    if 0 in sizes:
        return list(side_by_side(sizes))
    runs = merged([(size, (stride,)) for size, stride in zip(view.sizes, view.strides, strict=True)]) or [(1, (1,))]
    strides: list[Amount] = []
    left, (step,) = runs.pop()
    for size in reversed(sizes):
        if size == 1:
            strides.append(0)
            continue
        if left == 1 and runs:
            left, (step,) = runs.pop()
        if left % size:
            return None
        strides.append(step)
        left, step = left // size, step * size
    return strides[::-1]
