"""The published families of models whose folders are read, and the mixers that they are made of."""

from __future__ import annotations

from collections import Counter
from typing import Any

from seqarch.interop import FAMILIES
from seqarch.layers import FAMILIES as OURS
from seqarch.layers import MIXERS
from seqarch.models.pattern import tile_pattern
from seqarch.pretrained.their_settings import CLASSES


def families() -> list[dict[str, str | dict[str, int]]]:
    """Of each family its name, its class in transformers, and how many layers have which mixers."""
    return [
        {"name": name, "class": CLASSES.get(name, ""), "mixers": _mixers(family.Settings, family.lm_config)}
        for name, family in FAMILIES.items()
    ]


def _mixers(settings: Any, lm_config: Any) -> dict[str, int]:
    """By its settings' defaults; one of each kind where these leave it to a folder which layers are of which kind.

    Attention with and without a window counts as of one kind there: a window may be off.
    """
    named = {mixer for names in getattr(settings, "layer_kinds", {}).values() for mixer in names.values()}
    kinds = sorted(named & MIXERS.keys())
    try:
        config = lm_config(settings())
    except ValueError:  # the kinds have no default
        return dict.fromkeys(kinds, 1)
    layers = tile_pattern(config.pattern, config.depth)
    found = Counter(mixer.rpartition(":")[2].lower() for layer in layers for mixer in layer.mixers)
    left_open = len(found) == 1 and len({_family(mixer) for mixer in kinds}) > 1
    return dict.fromkeys(kinds, 1) if left_open else dict(found)


def _family(mixer: str) -> str:
    return next((family for family, members in OURS.items() if mixer in members), mixer)
