"""What a program is written for: the form of a state, apart from the whole numbers that may change from call to call.

These are a state's own, such as a cache's length, and the capacity of caches: the second size of tensors ``[B, T, G,
K]`` in a state that counts its tokens. A prompt of another length or with other room for it then needs no new program.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

CAPACITY = 1
"""The dimension of a cache that is its room."""


LEAVES = (Tensor, int, type(None))
"""Of most states."""


@cache
def _is_tuple(kind: type) -> bool:
    """Whether it is the type of a tuple, named or not, that torch goes through as such."""
    named = issubclass(kind, tuple) and hasattr(kind, "_fields") and kind not in pytree.SUPPORTED_NODES
    return kind is tuple or named


def leaves_of(state: Any) -> list[Any]:
    """What a state holds, in order. States are tuples of tuples as a rule, which torch takes long to go through."""
    found: list[Any] = []
    for each in state if _is_tuple(type(state)) else (state,):
        if type(each) in LEAVES:
            found.append(each)
        elif _is_tuple(type(each)):
            found += leaves_of(each)
        else:
            found += pytree.tree_leaves(each)
    return found


def with_leaves(state: Any, leaves: Iterator[Any]) -> Any:
    """A state of the same form that holds others, in order."""
    kind = type(state)
    if kind in LEAVES:
        return next(leaves)
    if _is_tuple(kind):
        inner = [with_leaves(each, leaves) for each in state]
        return tuple(inner) if kind is tuple else kind(*inner)
    return pytree.tree_map(lambda _: next(leaves), state)


def has_capacity(leaf: Any, leaves: Sequence[Any]) -> bool:
    """Whether a tensor is a cache whose room is a number like any other; below 2 it stands for itself."""
    return isinstance(leaf, Tensor) and _has_room(leaf.shape) and _counts(leaves)


def _has_room(sizes: Sequence[int]) -> bool:
    return len(sizes) == 4 and sizes[CAPACITY] >= 2


def form_of(leaves: Sequence[Any]) -> tuple[Hashable, ...]:
    """Kinds, sizes and dtypes, without the numbers that may change."""
    counts = _counts(leaves)  # asked once: this is looked at before every token, when it has left the cache
    return tuple([_kind(leaf, counts) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves])


def _counts(leaves: Sequence[Any]) -> bool:
    """Whether a state counts its tokens."""
    return int in map(type, leaves)


def _kind(leaf: Tensor, counts: bool) -> tuple[Hashable, ...]:
    sizes = leaf.shape
    if counts and _has_room(sizes):
        sizes = (*sizes[:CAPACITY], *sizes[CAPACITY + 1 :])
    return sizes, leaf.ndim, leaf.dtype, is_plain(leaf)


def is_plain(tensor: Tensor) -> bool:
    """Whether its numbers lie side by side in this process's memory, and nobody wants their gradients."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad


def numbers_of(leaves: Sequence[Any]) -> list[int]:
    """Those that may change, in order."""
    if not _counts(leaves):
        return []
    found = (leaf if type(leaf) is int else _capacity(leaf) for leaf in leaves)
    return [number for number in found if number is not None]


def _capacity(leaf: Any) -> int | None:
    return leaf.shape[CAPACITY] if isinstance(leaf, Tensor) and _has_room(leaf.shape) else None
