"""Random settings of the chooser, and what the library says of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from docs.site.chooser.formulas import DTYPES, WINDOWED
from seqarch import LanguageModel
from seqarch.layers import CHANNEL_MIXERS, MIXERS

LONGEST = 2**20
"""Tokens: the library's own counting takes time in proportion to them in places."""


def setting(rng: random.Random, widths: Sequence[int], most_layers: int) -> dict[str, Any]:
    """A pattern of up to so many layers, some with mixers side by side, windows or channel mixers of their own."""
    count = rng.randint(1, most_layers)
    repeats = rng.randint(1, 3) if rng.random() < 0.3 else 1
    return {
        "pattern": " ".join(_layer(rng) for _ in range(count)),
        "depth": count * repeats,
        "width": rng.choice(widths),
        "length": min(LONGEST, round(2 ** rng.uniform(0, 20.5))),
        "dtype": rng.choice(list(DTYPES)),
        "channel": rng.choice([*CHANNEL_MIXERS, "none"]),
        "vocabulary": rng.randint(1, 100_000),
    }


def _layer(rng: random.Random) -> str:
    mixers = [_mixer(rng) for _ in range(1 if rng.random() < 0.8 else 2)]
    channel = f"/{rng.choice([*CHANNEL_MIXERS, 'none'])}" if rng.random() < 0.2 else ""
    return "+".join(mixers) + channel


def _mixer(rng: random.Random) -> str:
    name = rng.choice(list(MIXERS))
    if name in WINDOWED and rng.random() < 0.5:
        return f"{name}({WINDOWED[name]}={round(2 ** rng.uniform(0, 12))})"
    return name


def numbers(setting: dict[str, Any]) -> dict[str, str] | None:
    """Parameters, FLOPs and bytes by the library; ``None`` where it refuses to build such a model."""
    options = {name: setting[name] for name in ("pattern", "depth", "channel")}
    try:
        with torch.device("meta"):
            model = LanguageModel(d_model=setting["width"], vocab_size=setting["vocabulary"], **options)
    except ValueError:
        return None
    model.to(DTYPES[setting["dtype"]])
    length = setting["length"]
    counts = {
        "parameters": model.num_parameters(),
        "flops": model.flops(length),
        "stepFlops": model.step_flops(length),
        "stateBytes": model.state_bytes(length),
    }
    return {name: str(count) for name, count in counts.items()}
