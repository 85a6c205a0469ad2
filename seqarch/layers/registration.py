"""Mixers and channel mixers of one's own, entered in the registries under a checked name."""

from __future__ import annotations

from typing import Any

from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.layers.mixer import ChannelMixer, Mixer


def register_mixer(name: str, mixer: type[Mixer]) -> None:
    """Make a mixer a choice of patterns by a name; once more with the same class changes nothing.

    Raises:
        TypeError: it is no class of :class:`Mixer`.
        ValueError: the name cannot stand in a pattern, or is another mixer's.
    """
    _register("mixer", MIXERS, Mixer, name, mixer)


def register_channel_mixer(name: str, channel: type[ChannelMixer]) -> None:
    """Make a channel mixer a choice of patterns by a name; errors as of :func:`register_mixer`."""
    _register("channel mixer", CHANNEL_MIXERS, ChannelMixer, name, channel)


def _register(kind: str, registry: dict[str, Any], base: type, name: str, layer: type) -> None:
    if not (isinstance(layer, type) and issubclass(layer, base) and layer is not base):
        raise TypeError(f"{kind} {name!r}: expected a subclass of {base.__name__}, got {layer!r}")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{kind} {name!r}: expected a name of letters, digits and _, as a pattern can hold")
    held = registry.setdefault(name, layer)
    if held is not layer:
        there, here = (f"{each.__module__}.{each.__qualname__}" for each in (held, layer))
        raise ValueError(f"{kind} {name!r} is {there} already, and {here} was to have that name too")
