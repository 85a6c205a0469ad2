"""What each mixer costs, as formulas from the mixers' own accounting: FLOPs in the length, at one width; the state's
bytes in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch

from seqarch.layers import Mixer, build_mixer

WIDTH = 1024
"""The ``d_model`` of the table; states are measured at multiples of it, where all heads are equally wide."""

LONG = 2**22
"""A length beyond every window and every number of chosen tokens."""


def formula(cost: Callable[[int], int]) -> str:
    """``a + b T`` or ``a + b log2 T``, whichever a cost follows at long lengths; its smallest terms are left out.

    Raises:
        ValueError: it follows neither.
    """
    at = [cost(LONG << i) for i in range(3)]
    for term, grows in (("T", lambda length: length), ("log2 T", math.log2)):
        slope = (at[1] - at[0]) / (grows(2 * LONG) - grows(LONG))
        fixed = at[0] - slope * grows(LONG)
        if math.isclose(fixed + slope * grows(4 * LONG), at[2], rel_tol=1e-4):
            matters = abs(slope) * grows(LONG) > 1e-4 * at[0]
            parts = [short(fixed) if fixed >= 1 else "", f"{short(slope)} {term}" if matters else ""]
            return " + ".join(part for part in parts if part) or "0"
    raise ValueError(f"a cost of {at} at lengths {[LONG << i for i in range(3)]} follows no formula")


def short(number: float) -> str:
    """Three digits and a unit: 8.39 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if number >= size:
            return f"{number / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{number:.4g}"


def costs(name: str) -> tuple[str, str, str, str]:
    """Parameters; FLOPs a token in training (forward) and in decoding; bytes of the state in float32."""
    with torch.device("meta"):
        mixer: Mixer = build_mixer(name, d_model=WIDTH)
    parameters = sum(parameter.numel() for parameter in mixer.parameters())
    return (
        short(parameters),
        formula(lambda length: round(mixer.flops(length) / length)),
        formula(mixer.step_flops),
        state_formula(name),
    )


def state_formula(name: str) -> str:
    """The bytes of the state in float32 as an exact polynomial in D and T, beyond every window.

    Raises:
        ValueError: they are none of degree 2 in D and 1 in T.
    """
    rows = [_in_length(name, step * WIDTH) for step in range(1, 5)]
    terms = []
    for values, factor in zip(zip(*rows, strict=True), ("T", ""), strict=True):
        a, b, c = _parabola(values)
        terms += [(c, f"D^2 {factor}"), (b, f"D {factor}"), (a, factor)]
    return " + ".join(f"{float(number):.10g} {of}".strip() for number, of in terms if number).replace("+ -", "- ")


def _in_length(name: str, width: int) -> tuple[int, int]:
    """The slope and what does not grow, at one width."""
    with torch.device("meta"):
        mixer = build_mixer(name, d_model=width)
    at = [mixer.state_bytes(LONG << i) for i in range(3)]
    slope = (at[1] - at[0]) // LONG
    if at[2] - at[1] != 2 * LONG * slope:
        raise ValueError(f"the state of {name} takes {at} bytes at lengths {[LONG << i for i in range(3)]}: no line")
    return slope, at[0] - LONG * slope


def _parabola(values: tuple[int, ...]) -> tuple[Fraction, Fraction, Fraction]:
    """The coefficients of ``a + b D + c D^2`` through values at 1 to 4 times ``WIDTH``."""
    first, second, third, fourth = map(Fraction, values)
    c = (first - 2 * second + third) / 2
    b, a = second - first - 3 * c, 3 * first - 3 * second + third
    if a + 4 * b + 16 * c != fourth:
        raise ValueError(f"{values} at multiples of {WIDTH} are no parabola")
    return a, b / WIDTH, c / WIDTH**2
