"""Mixers along time and along channels, as modules with one contract. ``build_mixer("mamba2", d_model=256)``."""

from typing import Any

from seqarch.layers.attention import Attention, SlidingWindow
from seqarch.layers.channel import Mlp, SwiGlu
from seqarch.layers.delta_net import DeltaNet
from seqarch.layers.gated_delta_net import GatedDeltaNet
from seqarch.layers.linear_attention import LinearAttention
from seqarch.layers.mamba import Mamba
from seqarch.layers.mamba2 import Mamba2
from seqarch.layers.mixer import (
    ChannelMixer,
    LayerConfig,
    Mixer,
    build_layer,
    clone_state,
    measured_state_bytes,
)
from seqarch.layers.moe import MixtureOfExperts
from seqarch.layers.retention import Retention
from seqarch.ops.common.checks import unknown_name

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "linear_attention": LinearAttention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "retention": Retention,
    "sliding_window": SlidingWindow,
}

CHANNEL_MIXERS: dict[str, type[ChannelMixer]] = {
    "mlp": Mlp,
    "moe": MixtureOfExperts,
    "swiglu": SwiGlu,
}


def build_mixer(name: str, *, d_model: int, **options: Any) -> Mixer:
    """The mixer of that name at width ``d_model``, with the options of its config.

    Raises:
        ValueError: no mixer has that name, it has no such option, or an option's value is out of range.
    """
    if name not in MIXERS:
        raise unknown_name("mixer", name, MIXERS)
    return build_layer("mixer", name, MIXERS[name], {"d_model": d_model, **options})


def build_channel_mixer(name: str, *, d_model: int, **options: Any) -> ChannelMixer:
    """The channel mixer of that name; errors as in :func:`build_mixer`."""
    if name not in CHANNEL_MIXERS:
        raise unknown_name("channel mixer", name, CHANNEL_MIXERS)
    return build_layer("channel mixer", name, CHANNEL_MIXERS[name], {"d_model": d_model, **options})


__all__ = [
    "CHANNEL_MIXERS",
    "MIXERS",
    "ChannelMixer",
    "LayerConfig",
    "Mixer",
    "build_channel_mixer",
    "build_mixer",
    "clone_state",
    "measured_state_bytes",
]
