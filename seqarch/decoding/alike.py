"""Modules that do the same with other parameters: what one was captured to do, the other does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

TENSORS = ("_parameters", "_buffers")
OWN = (*TENSORS, "_modules")
"""Of a module's attributes, those that are compared entry by entry."""


def are_alike(first: Sequence[nn.Module], second: Sequence[nn.Module]) -> bool:
    """Whether modules of the same classes have equal attributes, and parameters and buffers of equal sizes and dtypes.

    What cannot be compared counts as different.
    """
    one, other = (list(chain.from_iterable(each.named_modules() for each in modules)) for modules in (first, second))
    return len(one) == len(other) and all(
        name == twin_name and _same(module, twin) for (name, module), (twin_name, twin) in zip(one, other, strict=True)
    )


def _same(module: nn.Module, twin: nn.Module) -> bool:
    own, theirs = vars(module), vars(twin)
    if type(module) is not type(twin) or own.keys() != theirs.keys():
        return False
    plain = [name for name in own if name not in OWN]
    tensors = (_same_tensors(own[name], theirs[name]) for name in TENSORS)
    return all(_equal(own[name], theirs[name]) for name in plain) and all(tensors)


def _equal(value: Any, other: Any) -> bool:
    if value is other:
        return True
    try:
        return type(value) is type(other) and not isinstance(value, Tensor | nn.Module) and bool(value == other)
    except Exception:  # of somebody's own class
        return False


def _same_tensors(tensors: Mapping[str, Tensor | None], others: Mapping[str, Tensor | None]) -> bool:
    def kinds(of: Mapping[str, Tensor | None]) -> dict[str, Any]:
        return {name: None if t is None else (type(t), t.shape, t.dtype, t.device) for name, t in of.items()}

    return kinds(tensors) == kinds(others)


def rebound(
    tensors: Mapping[str, Tensor], first: Sequence[nn.Module], second: Sequence[nn.Module]
) -> dict[str, Tensor]:
    """Tensors of the first modules, by whatever name, as those of the second; constants stay."""

    def named(modules: Sequence[nn.Module]) -> list[Tensor]:
        return [tensor for each in modules for tensor in chain(each.parameters(), each.buffers())]

    twins = {id(tensor): twin for tensor, twin in zip(named(first), named(second), strict=True)}
    return {name: twins.get(id(tensor), tensor) for name, tensor in tensors.items()}
