"""How a run's model began: its embedding and its gates, in words for tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seqarch.layers import MIXERS
from seqarch.models import parse_pattern

STARTS = sorted({option for mixer in MIXERS.values() for option in mixer.Config.slow_gates} | {"dt_floor"})
"""The options of mixers that say how gates begin."""


def start_text(model: Mapping[str, Any]) -> str:
    """The start of a model by a run's ``config["model"]``: ``embedding 0.02, gates as released``.

    Gates are as released, slow (``init: slow_gates``), or begin by options of their mixers, which are named.
    """
    scale = model.get("embedding_scale", 1.0)
    times = "" if scale == 1 else f" times {scale:g}"
    return f"embedding {model.get('embedding_std', 0.02):g}{times}, gates {_gates(model)}"


def _gates(model: Mapping[str, Any]) -> str:
    """How the gates of the mixers in the pattern begin."""
    named: dict[str, Any] = {}
    for layer in parse_pattern(model["pattern"]):
        for name, own in zip(layer.mixers, layer.options, strict=True):
            options = {**model.get("mixers", {}).get(name, {}), **own}
            named |= {option: options[option] for option in STARTS if options.get(option) is not None}
    said = "slow" if model.get("init") == "slow_gates" else "as released"
    shown = ", ".join(f"{option} {value:g}" for option, value in named.items())
    return f"{said} but for {shown}" if named else said
