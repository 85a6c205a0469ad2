"""Mixers whose state is held in few bits between calls.

What a mixer carries is of three kinds, told by the names of fields in its state. ``recurrent`` is computed anew with
every token, so that errors of rounding go on: it is decoded before a call and coded after it, with stochastic rounding
and error feedback where they are asked for. Keys and values, and what else is a ``KVCache``, are coded when they are
written (:mod:`seqarch.layers.modules.coded_cache`). ``conv`` and ``inputs`` are inputs of convolutions, which are
rounded to the nearest and then stay as they are: a token has scales of its own, so coding them again changes nothing.
Whatever has another name stays as it is: positions, counts, angles, what keeps exponents in range, sums by which blocks
are chosen. So do ``forgotten``, a cache of sums whose differences count, and ``turned``, one of keys that are computed
anew with every token.
"""

from __future__ import annotations

from functools import cache, cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from seqarch.layers.mixer import Boundaries, Device, Mixer, measured_state_bytes
from seqarch.layers.modules.coded_cache import CodedCache, SmallCache
from seqarch.layers.modules.kv_cache import KVCache
from seqarch.layers.modules.state_format import Coded, StateFormat

INPUTS = {"conv": 2, "inputs": 3}
"""Fields with inputs of convolutions, and how many of their dimensions come before the channels of one token."""

EXACT = ("forgotten", "turned")
"""Fields with caches that are held in full."""

CACHED = ("_state_form", "_plain")
"""What a mixer keeps of the form of its states."""


class SmallState(Mixer):
    """What a mixer's class gets in front of it: the mixer between states that are codes.

    Gradients pass by the rounding of keys and values, and stop where a state is handed on.
    """

    plain: ClassVar[type[Mixer]]
    state_format: StateFormat

    def forward(
        self, x: Tensor, state: Any = None, cu_seqlens: Boundaries = None, taken: Any = None
    ) -> tuple[Tensor, Any] | tuple[Tensor, Any, Any]:
        working = None if state is None else self._in_call(state, self._plain)
        y, after, *given = super().forward(x, working, cu_seqlens, taken)
        return y, self._between_calls(after, state, _new_tokens(x, cu_seqlens)), *given

    def start(self, x: Tensor, cu_seqlens: Boundaries) -> Any:
        return self._in_call(super().start(x, cu_seqlens), self._plain)

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> Any:
        plain = super().new_state(batch_size, max_length, device, dtype)
        return self._between_calls(plain, None, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        return measured_state_bytes(self.init_state(batch_size, length, "meta"))

    @cached_property
    def _plain(self) -> Any:
        """A state of the mixer as it was, of one row and no token, without numbers."""
        return super().new_state(1, 0, "meta", None)

    def _in_call(self, part: Any, plain: Any) -> Any:
        """A state, or a part of one, as the mixer takes it; ``plain`` is what it was made for."""
        if isinstance(part, CodedCache):
            shapes = (plain.keys.shape[2:], plain.values.shape[2:])
            return SmallCache.in_call(part, self.state_format.of_tokens, shapes)
        if not hasattr(part, "_fields"):
            return tuple(self._in_call(each, plain) for each in part) if isinstance(part, tuple) else part
        if type(part) is not type(plain):  # the states of packed sequences
            return type(part)(*(self._in_call(each, plain) for each in part))
        return type(part)(
            *(
                self._decoded(name, each, own) if isinstance(each, Coded) else self._in_call(each, own)
                for name, each, own in zip(part._fields, part, plain, strict=True)
            )
        )

    def _decoded(self, name: str, part: Coded, plain: Tensor) -> Tensor:
        if name in INPUTS:
            return self.state_format.of_inputs.decode(part, plain.shape[-1], plain.dtype)
        width = self.state_format.layout(plain.shape)[-1]
        return self.state_format.decode(part, width, plain.dtype).view(-1, *plain.shape[1:])

    def _between_calls(self, part: Any, before: Any, new: Tensor) -> Any:
        """A state, or a part of one, as it is handed on, after ``new [B]`` more tokens than it was ``before``."""
        if isinstance(part, SmallCache):
            return part.between_calls
        if isinstance(part, KVCache):  # of no tokens
            return SmallCache.of(part, self.state_format.of_tokens).between_calls
        if not hasattr(part, "_fields"):
            return tuple(self._between_calls(each, None, new) for each in part) if isinstance(part, tuple) else part
        earlier = before if type(before) is type(part) else [None] * len(part)
        return type(part)(
            *(
                each
                if name in EXACT
                else self._coded(name, each, own, new)
                if isinstance(each, Tensor)
                else self._between_calls(each, own, new)
                for name, each, own in zip(part._fields, part, earlier, strict=True)
            )
        )

    def _coded(self, name: str, numbers: Tensor, before: Coded | None, new: Tensor) -> Any:
        form, numbers = self.state_format, numbers.detach()
        if name in INPUTS:
            return form.of_inputs.encode(numbers)
        if name != "recurrent":
            return numbers
        seen = (new if before is None or before.seen is None else before.seen + new) if form.is_stochastic else None
        rows = numbers.reshape(form.layout(numbers.shape))
        if before is not None and form.error_feedback:
            rows = rows + form.left_over(before, rows.shape[-1]).to(rows.dtype)
        return form.encode(rows, seen)._replace(seen=seen)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (self.plain,), self.__getstate__()  # the class is made where it is asked for


def _new_tokens(x: Tensor, cu_seqlens: Boundaries) -> Tensor:
    """``[B]``, tokens of each row in this call."""
    if cu_seqlens is None:
        return torch.full((x.shape[0],), x.shape[1], device=x.device)
    return torch.tensor([end - start for start, end in pairwise(cu_seqlens)], device=x.device)


@cache
def small_class(plain: type[Mixer]) -> type[SmallState]:
    """A mixer's class with :class:`SmallState` in front, under its own name."""
    own = {"plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (SmallState, plain), own)


def _new(plain: type[Mixer]) -> SmallState:
    kind = small_class(plain)
    return kind.__new__(kind)


def give_small_state(mixer: Mixer, form: StateFormat) -> None:
    """Let a mixer hold its state so, whatever it held it in before."""
    take_small_state(mixer)
    mixer.__class__ = small_class(type(mixer))
    mixer.state_format = form  # type: ignore[assignment]


def take_small_state(mixer: Mixer) -> None:
    """Let a mixer hold its state in full again."""
    for name in CACHED:
        vars(mixer).pop(name, None)
    if isinstance(mixer, SmallState):
        del mixer.state_format
        mixer.__class__ = mixer.plain  # pyright: ignore[reportAttributeAccessIssue]
