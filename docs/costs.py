"""What each mixer costs at one width, as formulas in the length, from the mixers' own accounting."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from seqarch.layers import Mixer, build_mixer

WIDTH = 1024
"""The ``d_model`` of the table."""

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
        formula(mixer.state_bytes),
    )
