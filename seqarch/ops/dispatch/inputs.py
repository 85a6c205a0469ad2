"""One object per call of an operation: the checked arguments, which every backend takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import annotated_kinds


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call once they are checked and their defaults filled in; a subclass per operation.

    The first field is a tensor ``[B, T, ...]``, on whose device the operation runs.
    """

    __match_args__: ClassVar[tuple[str, ...]]

    def values(self) -> tuple[Any, ...]:
        """All fields in order, as custom operators take them."""
        if torch.compiler.is_compiling():
            return tuple([getattr(self, name) for name in self.__match_args__])
        return tuple(self.__dict__.values())

    def replace(self, **changes: Any) -> Self:
        """The same inputs but for these fields."""
        if torch.compiler.is_compiling():
            names = self.__match_args__
            return type(self)(*[changes[name] if name in changes else getattr(self, name) for name in names])
        return self.make({**self.__dict__, **changes})

    @classmethod
    def make(cls, fields: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Self:
        """Inputs with all these fields, in order; in half of the time that a frozen dataclass takes to be made."""
        inputs = object.__new__(cls)
        inputs.__dict__.update(fields)
        return inputs

    @property
    def device(self) -> torch.device:
        return getattr(self, self.__match_args__[0]).device

    @property
    def length(self) -> int:
        """Tokens T of the first field."""
        return getattr(self, self.__match_args__[0]).shape[1]

    @classmethod
    @cache
    def tensor_fields(cls) -> tuple[str, ...]:
        """The names of the fields that hold tensors, or may."""
        kinds = annotated_kinds(cls)
        return tuple(field.name for field in fields(cls) if Tensor in kinds[field.name])


class RecurrenceInputs(Protocol):
    """The fields that the inputs of the matrix-state recurrences, linear attention and the delta rule, share."""

    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def log_decay(self) -> Tensor | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def state(self) -> Tensor: ...
    @property
    def offsets(self) -> tuple[int, ...] | None: ...
