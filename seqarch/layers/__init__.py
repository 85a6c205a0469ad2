"""Mixers along time and along channels, as modules with one contract. ``build_mixer("mamba2", d_model=256)``."""

from typing import Any

from seqarch.layers.attention.attention import Attention, SlidingWindow
from seqarch.layers.attention.mla import MLA
from seqarch.layers.channel.mlp import Mlp, SwiGlu
from seqarch.layers.channel.moe import MixtureOfExperts
from seqarch.layers.convolution.hyena import Hyena
from seqarch.layers.convolution.s4d import S4d
from seqarch.layers.delta_rule.delta_net import DeltaNet
from seqarch.layers.delta_rule.gated_delta_net import GatedDeltaNet
from seqarch.layers.delta_rule.gated_delta_net_2 import GatedDeltaNet2
from seqarch.layers.delta_rule.gated_delta_product import GatedDeltaProduct
from seqarch.layers.delta_rule.kda import KDA
from seqarch.layers.delta_rule.rwkv7 import Rwkv7
from seqarch.layers.linear_attention.based import Based
from seqarch.layers.linear_attention.gla import Gla
from seqarch.layers.linear_attention.hgrn2 import Hgrn2
from seqarch.layers.linear_attention.linear_attention import LinearAttention
from seqarch.layers.linear_attention.mlstm import Mlstm
from seqarch.layers.linear_attention.retention import Retention
from seqarch.layers.linear_attention.rwkv6 import Rwkv6
from seqarch.layers.materialize import materialize
from seqarch.layers.mixer import (
    ChannelMixer,
    Layer,
    LayerConfig,
    Mixer,
    build_layer,
    clone_state,
    detach_state,
    measured_state_bytes,
)
from seqarch.layers.recurrent.hgrn import Hgrn
from seqarch.layers.recurrent.min_gru import MinGru
from seqarch.layers.recurrent.rg_lru import RgLru
from seqarch.layers.rows import state_rows
from seqarch.layers.sparse_attention.big_bird import BigBird
from seqarch.layers.sparse_attention.dsa import DSA
from seqarch.layers.sparse_attention.longformer import Longformer
from seqarch.layers.sparse_attention.moba import MoBA
from seqarch.layers.sparse_attention.nsa import NSA
from seqarch.layers.state_space.mamba import Mamba
from seqarch.layers.state_space.mamba2 import Mamba2
from seqarch.layers.state_space.mamba3 import Mamba3
from seqarch.ops.dispatch.checks import unknown_name

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "based": Based,
    "big_bird": BigBird,
    "moba": MoBA,
    "dsa": DSA,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "gated_delta_net_2": GatedDeltaNet2,
    "gated_delta_product": GatedDeltaProduct,
    "gla": Gla,
    "hgrn": Hgrn,
    "hgrn2": Hgrn2,
    "hyena": Hyena,
    "kda": KDA,
    "mla": MLA,
    "linear_attention": LinearAttention,
    "longformer": Longformer,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "min_gru": MinGru,
    "mlstm": Mlstm,
    "nsa": NSA,
    "retention": Retention,
    "rg_lru": RgLru,
    "rwkv6": Rwkv6,
    "rwkv7": Rwkv7,
    "s4d": S4d,
    "sliding_window": SlidingWindow,
}

FAMILIES: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "sliding_window", "mla"),
    "sparse attention": ("big_bird", "moba", "dsa", "longformer", "nsa"),
    "linear attention": ("linear_attention", "retention", "based", "gla", "hgrn2", "mlstm", "rwkv6"),
    "state space": ("mamba2", "mamba", "mamba3"),
    "delta rule": ("gated_delta_net", "delta_net", "kda", "gated_delta_net_2", "gated_delta_product", "rwkv7"),
    "recurrence": ("rg_lru", "hgrn", "min_gru"),
    "convolution": ("hyena", "s4d"),
}
"""The mixers by kind, for tables and plots; the order is that in which they are shown."""

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
    if not isinstance(name, str) or name not in MIXERS:
        raise unknown_name("mixer", name, MIXERS)
    return build_layer("mixer", name, MIXERS[name], {"d_model": d_model, **options})


def build_channel_mixer(name: str, *, d_model: int, **options: Any) -> ChannelMixer:
    """The channel mixer of that name; errors as in :func:`build_mixer`."""
    if not isinstance(name, str) or name not in CHANNEL_MIXERS:
        raise unknown_name("channel mixer", name, CHANNEL_MIXERS)
    return build_layer("channel mixer", name, CHANNEL_MIXERS[name], {"d_model": d_model, **options})


__all__ = [
    "CHANNEL_MIXERS",
    "FAMILIES",
    "MIXERS",
    "ChannelMixer",
    "Layer",
    "LayerConfig",
    "Mixer",
    "build_channel_mixer",
    "build_mixer",
    "clone_state",
    "detach_state",
    "materialize",
    "measured_state_bytes",
    "state_rows",
]
