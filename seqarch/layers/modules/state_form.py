"""The form of a mixer's states, by which one that is passed in is checked."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.layers.modules.coded_cache import is_coded
from seqarch.ops.dispatch.checks import show


class StateForm:
    """The form of a mixer's states, from two without data and of one row: of no token, and of very many.

    A size that is the same in both is fixed; another lies between the two. An entry that is ``None`` in them is so in
    every state, unless its tuple has a default for it.
    """

    def __init__(self, least: Any, most: Any):
        self.kind = type(most)
        self.sizes: dict[str, tuple[tuple[int, int], ...]] = {}
        self.parts: dict[str, StateForm] = {}
        required = (name for name in most._fields if name not in most._field_defaults)
        self.absent = [name for name in required if getattr(most, name) is None]
        for name, low, high in zip(most._fields, least, most, strict=True):
            if isinstance(high, Tensor):
                self.sizes[name] = tuple(zip(low.shape[1:], high.shape[1:], strict=True))
            elif hasattr(high, "_fields"):
                self.parts[name] = StateForm(low, high)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StateForm) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def check(self, mixer: str, path: str, state: Any, rows: int) -> None:
        """Raise unless the state looks so and has so many rows; another named tuple may stand in for a part."""
        for name, bounds in self.sizes.items():
            given = getattr(state, name)
            shape = given.shape if isinstance(given, Tensor) else []
            if len(shape) == len(bounds) + 1 and shape[0] != rows:
                raise ValueError(f"{mixer}: the state has {shape[0]} rows, the call {rows} sequences")
            if len(shape) != len(bounds) + 1 or any(
                not a <= n <= b for n, (a, b) in zip(shape[1:], bounds, strict=True)
            ):
                sizes = ", ".join([str(rows), *(_show_bounds(*each) for each in bounds)])
                shown = f"of shape {list(shape)}" if isinstance(given, Tensor) else show(given)
                raise ValueError(f"{mixer}: {path}.{name} is {shown}, expected [{sizes}]")
        for name in self.absent:
            if (given := getattr(state, name)) is not None:
                raise ValueError(f"{mixer}: {path}.{name} is {show(given)}, expected None")
        for name, form in self.parts.items():
            part = getattr(state, name)
            if type(part) is not form.kind and (is_coded(part) or is_coded(form.kind)):
                raise ValueError(
                    f"{mixer}: {path}.{name} is {type(part).__name__}, expected {form.kind.__name__}: the state is of"
                    " another format than the mixer's (seqarch.quantize_state)"
                )
            if not hasattr(part, "_fields"):
                raise ValueError(f"{mixer}: {path}.{name} is {show(part)}, expected {form.kind.__name__}")
            if type(part) is form.kind:
                form.check(mixer, f"{path}.{name}", part, rows)


def _show_bounds(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} or more" if most > 1 << 32 else f"{least} to {most}"
