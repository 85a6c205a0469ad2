"""Rows of states: chosen, repeated, left out, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import show


def state_rows(state: Any, index: Sequence[int] | Tensor) -> Any:
    """The rows ``index`` of a state of a mixer, a stack or a model, as a state of their own: ``O(size of the result)``.

    For the beams of a search, rows that are finished, requests that come and go: a row may be named more than once or
    not at all, in any order. The result is a copy; a call that consumes it leaves the given state alone. Rows of
    different lengths, as after packed prompts, keep the room of the longest one there was. Gradients flow.

    A state is a named tuple whose tensors have the rows first. A part that holds its rows in another way has a property
    ``row_count`` and a method ``select_rows(index: list[int])``, as
    :class:`~seqarch.layers.modules.kv_cache.PackedKV` has.

    Args:
        state: what a call returned, or ``init_state``.
        index: whole numbers from 0 to the number of rows - 1, a list or an integer tensor ``[R]``.

    Raises:
        ValueError: it is no state, its parts differ in their rows, or the index is of another kind or out of range.
    """
    return select(state, _row_numbers(index, row_count(state)))


def leave_rows(state: Any, index: Sequence[int] | Tensor) -> Any:
    """The state without the rows ``index``: a copy of the others, in their order.

    Raises:
        ValueError: as of :func:`state_rows`, or a row is named twice.
    """
    rows = row_count(state)
    leaving = _row_numbers(index, rows)
    if len(set(leaving)) < len(leaving):
        raise ValueError(f"leave_rows: index is {show(leaving)}, expected each row once")
    return select(state, [row for row in range(rows) if row not in leaving])


def row_count(state: Any) -> int:
    """The rows of a state of a mixer, a stack or a model.

    Raises:
        ValueError: it is no state, or its parts differ in their rows.
    """
    counts = set(_counts(state))
    if len(counts) != 1:
        what = f"parts of {sorted(counts)} rows" if counts else show(state)
        raise ValueError(f"state_rows: the state is {what}, expected one that a mixer, a stack or a model returned")
    return counts.pop()


def join_rows(states: Sequence[Any]) -> Any:
    """The rows of several states of one mixer, stack or model, one after another, as one state: a copy.

    Sequences may differ in length: caches are then as long as the longest there is, and have the room of the roomiest,
    so that ``init_state(0, max_length)`` among the states reserves room. Tensors are of the first state's dtype. A part
    that holds its rows in another way has a method ``joined(others)``, as
    :class:`~seqarch.layers.modules.kv_cache.KVCache` has, one that is a list of states ``one_by_one()``, and one
    that another form of the same is put together as, ``as_rows()``.

    Raises:
        ValueError: there are none, they are of different kinds, or of parts that cannot be put together.
    """
    if not states:
        raise ValueError("join_rows: no state was given, expected at least one")
    parts = [part for state in states for part in (state.one_by_one() if hasattr(state, "one_by_one") else [state])]
    first, *others = parts = [part.as_rows() if hasattr(part, "as_rows") else part for part in parts]
    kinds = sorted({type(part).__name__ for part in parts})
    if len(kinds) > 1 or (hasattr(first, "select_rows") and not hasattr(first, "joined")):
        raise ValueError(f"join_rows: states with parts {', '.join(kinds)} cannot be put together")
    if hasattr(first, "joined"):
        return first.joined(others)
    if isinstance(first, Tensor):
        if any(other.shape[1:] != first.shape[1:] for other in others):
            shapes = [list(part.shape) for part in parts]
            raise ValueError(f"join_rows: tensors of shapes {shapes}, expected shapes that differ in their rows alone")
        return torch.cat([first, *(other.to(first.dtype) for other in others)]) if first.ndim else first
    if isinstance(first, (tuple, list)):
        if any(len(other) != len(first) for other in others):
            raise ValueError(f"join_rows: states of {[len(part) for part in parts]} parts cannot be put together")
        made = [join_rows(same) for same in zip(*parts, strict=True)]
        return type(first)(*made) if hasattr(first, "_fields") else type(first)(made)
    return first


def padded_to(tensors: Sequence[Any], dim: int, dtype: torch.dtype | None = None, *, left: bool = False) -> Any:
    """The rows of tensors that differ in one dimension, in which shorter ones get zeros after them, or before.

    Of named tuples of tensors, such as codes and scales, each of the tensors. The dtype is by default the first one's.
    """
    if hasattr(tensors[0], "_fields"):
        parts = zip(*tensors, strict=True)
        return type(tensors[0])(*(None if part[0] is None else padded_to(part, dim, left=left) for part in parts))
    dtype = tensors[0].dtype if dtype is None else dtype
    longest = max(tensor.shape[dim] for tensor in tensors)
    made = []
    for tensor in tensors:
        shape = [*tensor.shape]
        shape[dim] = longest - shape[dim]
        zeros, tensor = tensor.new_zeros(shape, dtype=dtype), tensor.to(dtype)
        made.append(torch.cat([zeros, tensor] if left else [tensor, zeros], dim))
    return torch.cat(made)


def select(part: Any, index: list[int]) -> Any:
    """The rows of a part of a state; what is no tensor is the same for all rows."""
    if hasattr(part, "select_rows"):
        return part.select_rows(index)
    if isinstance(part, Tensor):
        return part.index_select(0, torch.tensor(index, dtype=torch.int64, device=part.device))
    if isinstance(part, (tuple, list)):
        made = [select(each, index) for each in part]
        return type(part)(*made) if hasattr(part, "_fields") else type(part)(made)
    return part


def _counts(part: Any) -> list[int]:
    """The numbers of rows of all parts."""
    if hasattr(part, "select_rows"):
        return [part.row_count]
    if isinstance(part, Tensor):
        return [len(part)] if part.ndim else []
    if isinstance(part, (tuple, list)):
        return [count for each in part for count in _counts(each)]
    return []


def _row_numbers(index: Any, rows: int) -> list[int]:
    """The index as integers.

    Raises:
        ValueError: it is none, or a number is not from 0 to ``rows - 1``.
    """
    numbers: Any = index.tolist() if isinstance(index, Tensor) and index.ndim == 1 else index
    whole = isinstance(numbers, Sequence) and all(type(number) is int for number in numbers)
    if not whole or isinstance(numbers, str):
        given = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else show(index)
        hint = "; of a mask, mask.nonzero().flatten()" if isinstance(index, Tensor) else ""
        raise ValueError(f"state_rows: index is {given}, expected a list of row numbers{hint}")
    for number in numbers:
        if not 0 <= number < rows:
            raise ValueError(f"state_rows: row {number} was asked for, expected 0 to {rows - 1}: the state has {rows}")
    return [*numbers]
