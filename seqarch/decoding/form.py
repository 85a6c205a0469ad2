"""What a program is written for: the form of a state, apart from the whole numbers that may change from call to call.

These are a state's own, such as a cache's length, and the capacity of caches: the second size of tensors ``[B, T, G,
K]`` in a state that counts its tokens. A prompt of another length or with other room for it then needs no new program.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

CAPACITY = 1
"""The dimension of a cache that is its room."""


LEAVES = (Tensor, int, type(None))
"""Of most states."""


def leaves_of(state: Any) -> list[Any]:
    """What a state holds, in order. States are tuples of tuples as a rule, which torch takes long to go through."""
    found: list[Any] = []
    for each in state if type(state) is tuple else (state,):
        if type(each) is tuple:
            found += leaves_of(each)
        elif type(each) in LEAVES:
            found.append(each)
        else:
            found += pytree.tree_leaves(each)
    return found


def with_leaves(state: Any, leaves: Iterator[Any]) -> Any:
    """A state of the same form that holds others, in order."""
    if type(state) is tuple:
        return tuple([with_leaves(each, leaves) for each in state])
    if type(state) in LEAVES:
        return next(leaves)
    return pytree.tree_map(lambda _: next(leaves), state)


def has_capacity(leaf: Any, leaves: Sequence[Any]) -> bool:
    """Whether a tensor is a cache whose room is a number like any other; below 2 it stands for itself."""
    if not isinstance(leaf, Tensor) or leaf.ndim != 4 or leaf.shape[CAPACITY] < 2:
        return False
    return any(type(each) is int for each in leaves)


def form_of(leaves: Sequence[Any]) -> tuple[Hashable, ...]:
    """Kinds, sizes and dtypes, without the numbers that may change."""
    return tuple(
        (tuple(leaf.shape[:1]) + tuple(leaf.shape[2:]) if has_capacity(leaf, leaves) else leaf.shape, *_kind(leaf))
        if isinstance(leaf, Tensor)
        else type(leaf)
        for leaf in leaves
    )


def _kind(leaf: Tensor) -> tuple[Hashable, ...]:
    return leaf.ndim, leaf.dtype, is_plain(leaf)


def is_plain(tensor: Tensor) -> bool:
    """Whether its numbers lie side by side in this process's memory, and nobody wants their gradients."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad


def numbers_of(leaves: Sequence[Any]) -> list[int]:
    """Those that may change, in order."""
    found = (leaf if type(leaf) is int else _capacity(leaf, leaves) for leaf in leaves)
    return [number for number in found if number is not None]


def _capacity(leaf: Any, leaves: Sequence[Any]) -> int | None:
    return leaf.shape[CAPACITY] if has_capacity(leaf, leaves) else None
