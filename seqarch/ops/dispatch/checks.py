"""Argument checks with errors that name what was given, what was expected and the nearest right choice."""

from __future__ import annotations

import difflib
import functools
import reprlib
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from seqarch.ops.dispatch.eager import is_batched, is_traced

P = ParamSpec("P")
R = TypeVar("R")


class BackendError(RuntimeError):
    """No backend, or not the one that was asked for, can serve a call, or the derivatives that are asked of it."""


def unknown_name(kind: str, given: str, choices: Iterable[str]) -> ValueError:
    """The error for a name that is not in a registry: lists the right ones and the nearest."""
    names = sorted(choices)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {given!r}: expected one of {', '.join(names)}.{hint}")


Kinds = tuple[type, ...]


@functools.cache
def annotated_kinds(annotated: Any) -> dict[str, Kinds]:
    """The classes of each parameter of a function, or attribute of a class, by its annotation."""
    hints = get_type_hints(annotated)
    hints.pop("return", None)
    parts = {name: get_args(hint) if isinstance(hint, UnionType) else (hint,) for name, hint in hints.items()}
    return {name: tuple(get_origin(kind) or kind for kind in kinds) for name, kinds in parts.items()}


def fits(value: Any, kinds: Kinds) -> bool:
    """Whether a value is of one of these kinds: an integer is a float too, but ``True`` is no number.

    A length that a compiler has not fixed is an integer.
    """
    if isinstance(value, bool):
        return bool in kinds
    whole = isinstance(value, int | torch.SymInt)
    return isinstance(value, kinds) or (whole and (int in kinds or float in kinds))


def show_kinds(kinds: Kinds) -> str:
    return " | ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)


def show(value: Any) -> str:
    """A value and its type, shortened."""
    return "None" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


def typed(op: str, function: Callable[P, R]) -> Callable[P, R]:
    """A public operation, after a check that its arguments, but for ``backend``, are what they are annotated to be.

    Raises:
        TypeError: one is of another type.
    """
    kinds = annotated_kinds(function)
    del kinds["backend"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in (*zip(kinds, args, strict=False), *kwargs.items()):
            if name in kinds and type(value) not in kinds[name] and not fits(value, kinds[name]):
                raise TypeError(f"{op}: {name} is {show(value)}, expected {show_kinds(kinds[name])}")
        return function(*args, **kwargs)

    return checked


def match_shapes(op: str, **tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """Bind the letters of each pattern to sizes; the same letter must mean the same size throughout.

    Each keyword is ``name=(tensor, "B T H K")``; a ``None`` tensor is passed over.

    Raises:
        ValueError: a tensor has another number of dimensions, or a letter two sizes.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, (tensor, pattern) in tensors.items():
        if tensor is None:
            continue
        letters, shape = pattern.split(), tensor.shape
        if len(shape) != len(letters):
            raise ValueError(f"{_shown(op, name, shape, letters)}, {len(letters)} dimensions")
        for letter, size in zip(letters, shape, strict=True):
            if letter not in sizes:
                sizes[letter], owner[letter] = size, name
            elif sizes[letter] != size:
                shown = _shown(op, name, shape, letters)
                raise ValueError(f"{shown} with {letter} = {sizes[letter]} as in {owner[letter]}")
    return sizes


def _shown(op: str, name: str, shape: Sequence[int], letters: list[str]) -> str:
    return f"{op}: {name} has shape {list(shape)}, expected [{', '.join(letters)}]"


def divides(op: str, few: int, few_name: str, many: int, many_name: str) -> None:
    """Raise unless ``many`` heads can be shared out evenly over ``few``."""
    if few < 1 or many % few:
        raise ValueError(f"{op}: {many_name} ({many}) must be a multiple of {few_name} ({few})")


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floating_on_one_device(op: str, **tensors: Tensor | None) -> None:
    """Raise unless all tensors are dense, of a dtype of :data:`FLOATS` and on one device."""
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            floats = "a floating point dtype: float64, float32, bfloat16 or float16"
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {floats}")
        dense(op, name, tensor)
        first = first or (name, tensor)
        if tensor.device != first[1].device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {first[1].device} as {first[0]}")


def dense(op: str, name: str, tensor: Tensor) -> None:
    """Raise if a tensor is sparse, nested or in a library's own layout.

    Not asked of a compiler's tensors, since it lets nobody ask in the backward pass of an ``autograd.Function``.
    """
    if not torch.compiler.is_compiling() and tensor.layout is not torch.strided:
        raise TypeError(f"{op}: {name} has layout {tensor.layout}, expected torch.strided")


def finite_scale(op: str, scale: float | None, width: int) -> float:
    """The scale of scores or outputs, ``width ** -0.5`` unless given."""
    if width < 1:
        raise ValueError(f"{op}: q and k are {width} wide, expected at least 1")
    if scale is None:
        return width**-0.5
    if not -_LARGEST <= scale <= _LARGEST:
        raise ValueError(f"{op}: scale is {show(scale)}, expected a finite number")
    return float(scale)


_LARGEST = torch.finfo(torch.float64).max


def sequence_offsets(
    op: str, cu_seqlens: Tensor | Sequence[int] | None, batch: int, length: int
) -> tuple[int, ...] | None:
    """Check ``cu_seqlens`` and return it as plain integers (``None`` stays ``None``).

    Raises:
        ValueError: the batch is not 1, or the offsets are none, do not start at 0, decrease, or do not end at
            ``length``.
    """
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, Tensor):
        dense(op, "cu_seqlens", cu_seqlens)
        if cu_seqlens.is_meta:
            raise ValueError(f"{op}: cu_seqlens is on meta, expected a device that holds its values")
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{op}: cu_seqlens must be a 1-D int32 or int64 tensor,"
                f" got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
            )
        cu_seqlens = cu_seqlens.tolist()
    if not isinstance(cu_seqlens, Sequence):
        raise ValueError(f"{op}: cu_seqlens: expected offsets from 0 to T, got {cu_seqlens!r}")
    offsets = tuple(cu_seqlens)
    if not all(fits(offset, (int,)) for offset in offsets):
        raise ValueError(f"{op}: cu_seqlens must be whole numbers, got {cu_seqlens!r}")
    if batch != 1:
        raise ValueError(f"{op}: cu_seqlens packs sequences into a batch of 1, got a batch of {batch}")
    if len(offsets) < 2 or offsets[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0 and name at least one sequence, got {list(offsets)}")
    for i, (left, right) in enumerate(pairwise(offsets)):
        if right < left:
            raise ValueError(f"{op}: cu_seqlens must not decrease, got {left} then {right} at entry {i + 1}")
    if offsets[-1] != length:
        raise ValueError(f"{op}: cu_seqlens must end at the length {length}, got {offsets[-1]}")
    return offsets


def entries_within(op: str, name: str, index: Tensor, least: int, most: int) -> None:
    """Raise unless all entries are in ``least..most``; only on a CPU and not in a trace, where nothing has to wait."""
    if is_traced() or is_batched(index) or type(index) is not Tensor or index.device.type != "cpu" or not index.numel():
        return
    low, high = (int(end) for end in index.aminmax())
    if low < least or high > most:
        raise ValueError(f"{op}: {name} has entries from {low} to {high}, expected {least} to {most}")


def key_start(op: str, start: Tensor | None, packed: bool, device: torch.device) -> None:
    """Raise unless ``start`` may be the first key of each row that is not padding."""
    if start is None:
        return
    if packed:
        raise ValueError(f"{op}: key_start is for rows of a batch, cu_seqlens for packed sequences; give one of them")
    dense(op, "key_start", start)
    if start.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: key_start has dtype {start.dtype}, expected int32 or int64")
    if start.device != device:
        raise ValueError(f"{op}: key_start is on {start.device}, expected {device} as q")


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: the dtype of recurrent states and sums."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def promoted_dtype(first: Tensor, *others: Tensor) -> torch.dtype:
    """The narrowest dtype that holds the numbers of all."""
    return functools.reduce(torch.promote_types, (x.dtype for x in others), first.dtype)


def initial_state(
    op: str, state: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The given state, checked and widened to ``dtype``, or zeros."""
    if state is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    if tuple(state.shape) != shape:
        raise ValueError(f"{op}: state has shape {list(state.shape)}, expected {list(shape)}")
    if state.device != device:
        raise ValueError(f"{op}: state is on {state.device}, expected {device}")
    return state.to(dtype)
