"""One check of what runs on a device: how far off it is, or what was raised in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One comparison: its name, its error and the bound on it, or what was raised in its place."""

    name: str
    error: float
    bound: float
    raised: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # NaN never passes

    def __str__(self) -> str:
        return f"{self.name}: " + (self.raised or f"off by {self.error:.2g}, at most {self.bound:g} is right")


def guarded(name: str, checks: Callable[[], Iterator[Check]]) -> list[Check]:
    """All checks; the one that raises an error has failed, and is the last."""
    found: list[Check] = []
    try:
        found.extend(checks())
    except Exception as error:
        found.append(failed(name, f"{type(error).__name__}: {error}".strip()))
    return found


def failed(name: str, reason: str) -> Check:
    """A check that came to no number."""
    return Check(name, math.nan, 0.0, reason)
