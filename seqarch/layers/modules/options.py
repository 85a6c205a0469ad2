"""Checks of options, the fields of a frozen dataclass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from seqarch.ops.dispatch.checks import annotated_kinds, fits, show, show_kinds

MOST = 2**63 - 1
"""The largest whole number among options: what torch and kernels take."""


def check_options(config: Any, may_be_zero: Sequence[str] = ()) -> None:
    """Check the type of every field of a dataclass, and that numbers are finite, positive and, integers, within reach.

    Raises:
        ValueError: one is not; it is named.
    """
    kinds = annotated_kinds(type(config))
    for option in fields(config):
        value, expected = getattr(config, option.name), kinds[option.name]
        if not fits(value, expected):
            raise ValueError(f"{option.name} must be {show_kinds(expected)}, got {value!r}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            zero = option.name in may_be_zero
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
                least = "at least 0" if zero else "at least 1" if int in expected else "positive"
                raise ValueError(f"{option.name} must be {least}, got {value}")
            if isinstance(value, int) and value > MOST:
                raise ValueError(f"{option.name} must be at most {MOST}, got {value}")


def check_factors(option: str, factors: Sequence[Any], count: int) -> None:
    """Check that these constants are so many, finite and positive numbers.

    Raises:
        ValueError: they are not.
    """
    right = [factor for factor in factors if fits(factor, (float,)) and math.isfinite(factor) and factor > 0]
    if not len(right) == len(factors) == count:
        raise ValueError(f"{option} must be {count} positive numbers, got {show(factors)}")
