"""Mixers along time and along channels, as modules with one contract. ``build_mixer("mamba2", d_model=256)``."""

from typing import Any

from seqarch.layers.attention.attention import Attention, AttentionConfig, SlidingWindow, SlidingWindowConfig
from seqarch.layers.attention.forgetting_attention import ForgettingAttention, ForgettingAttentionConfig
from seqarch.layers.attention.mla import MLA, MLAConfig
from seqarch.layers.attention.path_attention import PathAttention, PathAttentionConfig
from seqarch.layers.attention.stick_breaking_attention import StickBreakingAttention, StickBreakingAttentionConfig
from seqarch.layers.bidirectional import Bidirectional
from seqarch.layers.channel.mlp import Mlp, MlpConfig, SwiGlu, SwiGluConfig
from seqarch.layers.channel.moe import MixtureOfExperts, MixtureOfExpertsConfig
from seqarch.layers.convolution.gated_short_conv import GatedShortConv, GatedShortConvConfig
from seqarch.layers.convolution.hyena import Hyena, HyenaConfig
from seqarch.layers.convolution.s4d import S4d, S4dConfig
from seqarch.layers.delta_rule.comba import Comba, CombaConfig
from seqarch.layers.delta_rule.delta_net import DeltaNet, DeltaNetConfig
from seqarch.layers.delta_rule.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from seqarch.layers.delta_rule.gated_delta_net_2 import GatedDeltaNet2, GatedDeltaNet2Config
from seqarch.layers.delta_rule.gated_delta_product import GatedDeltaProduct, GatedDeltaProductConfig
from seqarch.layers.delta_rule.jet_block import JetBlock, JetBlockConfig
from seqarch.layers.delta_rule.kda import KDA, KDAConfig
from seqarch.layers.delta_rule.log_linear_gated_delta_net import LogLinearGatedDeltaNet, LogLinearGatedDeltaNetConfig
from seqarch.layers.delta_rule.preconditioned_gated_delta_net import (
    PreconditionedGatedDeltaNet,
    PreconditionedGatedDeltaNetConfig,
)
from seqarch.layers.delta_rule.preconditioned_kda import PreconditionedKDA, PreconditionedKDAConfig
from seqarch.layers.delta_rule.rwkv7 import Rwkv7, Rwkv7Config
from seqarch.layers.hybrid.rwkv_channel_mix import RwkvChannelMix, RwkvChannelMixConfig
from seqarch.layers.linear_attention.based import Based, BasedConfig
from seqarch.layers.linear_attention.gated_kalma_net import GatedKalmaNet, GatedKalmaNetConfig
from seqarch.layers.linear_attention.gated_slot_attention import GatedSlotAttention, GatedSlotAttentionConfig
from seqarch.layers.linear_attention.gla import Gla, GlaConfig
from seqarch.layers.linear_attention.hgrn2 import Hgrn2, Hgrn2Config
from seqarch.layers.linear_attention.lightning_attention import LightningAttention, LightningAttentionConfig
from seqarch.layers.linear_attention.linear_attention import LinearAttention, LinearAttentionConfig
from seqarch.layers.linear_attention.lolcats import LoLCATs, LoLCATsConfig
from seqarch.layers.linear_attention.mesa_net import MesaNet, MesaNetConfig
from seqarch.layers.linear_attention.mlstm import Mlstm, MlstmConfig
from seqarch.layers.linear_attention.retention import Retention, RetentionConfig
from seqarch.layers.linear_attention.rwkv6 import Rwkv6, Rwkv6Config
from seqarch.layers.materialize import materialize
from seqarch.layers.mixer import (
    ChannelMixer,
    Layer,
    LayerConfig,
    Mixer,
    clone_state,
    detach_state,
    measured_state_bytes,
)
from seqarch.layers.modules.configured import build_layer
from seqarch.layers.recurrent.gru import Gru, GruConfig
from seqarch.layers.recurrent.hgrn import Hgrn, HgrnConfig
from seqarch.layers.recurrent.lstm import Lstm, LstmConfig
from seqarch.layers.recurrent.min_gru import MinGru, MinGruConfig
from seqarch.layers.recurrent.rg_lru import RgLru, RgLruConfig
from seqarch.layers.recurrent.slstm import Slstm, SlstmConfig
from seqarch.layers.registry import COMPOSED, RESERVED, find, register
from seqarch.layers.rows import state_rows
from seqarch.layers.sparse_attention.big_bird import BigBird, BigBirdConfig
from seqarch.layers.sparse_attention.dsa import DSA, DSAConfig
from seqarch.layers.sparse_attention.longformer import Longformer, LongformerConfig
from seqarch.layers.sparse_attention.moba import MoBA, MoBAConfig
from seqarch.layers.sparse_attention.nsa import NSA, NSAConfig
from seqarch.layers.sparse_attention.sparse_mla import SparseMLA, SparseMLAConfig
from seqarch.layers.state_space.log_linear_mamba2 import LogLinearMamba2, LogLinearMamba2Config
from seqarch.layers.state_space.mamba import Mamba, MambaConfig
from seqarch.layers.state_space.mamba2 import Mamba2, Mamba2Config
from seqarch.layers.state_space.mamba3 import Mamba3, Mamba3Config

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "based": Based,
    "big_bird": BigBird,
    "moba": MoBA,
    "dsa": DSA,
    "comba": Comba,
    "delta_net": DeltaNet,
    "forgetting_attention": ForgettingAttention,
    "gated_delta_net": GatedDeltaNet,
    "gated_delta_net_2": GatedDeltaNet2,
    "gated_delta_product": GatedDeltaProduct,
    "gated_kalma_net": GatedKalmaNet,
    "gated_short_conv": GatedShortConv,
    "gated_slot_attention": GatedSlotAttention,
    "gla": Gla,
    "gru": Gru,
    "hgrn": Hgrn,
    "hgrn2": Hgrn2,
    "hyena": Hyena,
    "jet_block": JetBlock,
    "kda": KDA,
    "mla": MLA,
    "lightning_attention": LightningAttention,
    "linear_attention": LinearAttention,
    "log_linear_gated_delta_net": LogLinearGatedDeltaNet,
    "log_linear_mamba2": LogLinearMamba2,
    "lolcats": LoLCATs,
    "longformer": Longformer,
    "lstm": Lstm,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "mesa_net": MesaNet,
    "min_gru": MinGru,
    "mlstm": Mlstm,
    "nsa": NSA,
    "path_attention": PathAttention,
    "preconditioned_gated_delta_net": PreconditionedGatedDeltaNet,
    "preconditioned_kda": PreconditionedKDA,
    "retention": Retention,
    "rg_lru": RgLru,
    "rwkv6": Rwkv6,
    "rwkv7": Rwkv7,
    "rwkv_channel_mix": RwkvChannelMix,
    "s4d": S4d,
    "sliding_window": SlidingWindow,
    "slstm": Slstm,
    "sparse_mla": SparseMLA,
    "stick_breaking_attention": StickBreakingAttention,
}

FAMILIES: dict[str, tuple[str, ...]] = {
    "attention": (
        "attention",
        "sliding_window",
        "forgetting_attention",
        "path_attention",
        "stick_breaking_attention",
        "mla",
    ),
    "sparse attention": ("big_bird", "moba", "dsa", "sparse_mla", "longformer", "nsa"),
    "linear attention": (
        "linear_attention",
        "retention",
        "lightning_attention",
        "based",
        "lolcats",
        "gla",
        "hgrn2",
        "mlstm",
        "gated_slot_attention",
        "mesa_net",
        "gated_kalma_net",
        "rwkv6",
    ),
    "state space": ("mamba2", "mamba", "mamba3", "log_linear_mamba2"),
    "delta rule": (
        "gated_delta_net",
        "delta_net",
        "kda",
        "gated_delta_net_2",
        "gated_delta_product",
        "preconditioned_gated_delta_net",
        "preconditioned_kda",
        "log_linear_gated_delta_net",
        "comba",
        "jet_block",
        "rwkv7",
    ),
    "recurrence": ("rg_lru", "hgrn", "min_gru", "slstm", "lstm", "gru"),
    "convolution": ("hyena", "s4d", "gated_short_conv", "rwkv_channel_mix"),
}
"""The mixers by kind, for tables and plots; the order is that in which they are shown."""

CHANNEL_MIXERS: dict[str, type[ChannelMixer]] = {
    "mlp": Mlp,
    "moe": MixtureOfExperts,
    "swiglu": SwiGlu,
}


def mixer_class(name: str) -> type[Mixer]:
    """The mixer of that name, or at that import path: ``"mamba2"``, ``"my_package.mixers:Leaky"``.

    Raises:
        ValueError: no mixer has that name, or none is there.
    """
    path = COMPOSED.get(name, name) if isinstance(name, str) else name
    return find("mixer", MIXERS, Mixer, path, also=COMPOSED)


def channel_mixer_class(name: str) -> type[ChannelMixer]:
    """The channel mixer of that name or import path; errors as in :func:`mixer_class`."""
    return find("channel mixer", CHANNEL_MIXERS, ChannelMixer, name, also=RESERVED)


def register_mixer(name: str, mixer: type[Mixer]) -> None:
    """Make a mixer of one's own one that patterns and configurations can name; once more is no error.

    Raises:
        ValueError: the class is no mixer with a ``Config``, the name is not made of letters, digits and ``_``, or it is
            another class's.
    """
    register("mixer", MIXERS, Mixer, name, mixer)


def register_channel_mixer(name: str, channel_mixer: type[ChannelMixer]) -> None:
    """The same for a channel mixer."""
    register("channel mixer", CHANNEL_MIXERS, ChannelMixer, name, channel_mixer)


def build_mixer(name: str, *, d_model: int, **options: Any) -> Mixer:
    """The mixer of that name or import path at width ``d_model``, with the options of its config.

    Raises:
        ValueError: no mixer has that name, it has no such option, or an option's value is out of range.
    """
    return build_layer("mixer", name, mixer_class(name), {"d_model": d_model, **options})


def build_channel_mixer(name: str, *, d_model: int, **options: Any) -> ChannelMixer:
    """The channel mixer of that name or import path; errors as in :func:`build_mixer`."""
    return build_layer("channel mixer", name, channel_mixer_class(name), {"d_model": d_model, **options})


__all__ = [
    "CHANNEL_MIXERS",
    "DSA",
    "FAMILIES",
    "KDA",
    "MIXERS",
    "MLA",
    "NSA",
    "Attention",
    "AttentionConfig",
    "Based",
    "BasedConfig",
    "Bidirectional",
    "BigBird",
    "BigBirdConfig",
    "ChannelMixer",
    "Comba",
    "CombaConfig",
    "DSAConfig",
    "DeltaNet",
    "DeltaNetConfig",
    "ForgettingAttention",
    "ForgettingAttentionConfig",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "GatedDeltaNet2Config",
    "GatedDeltaNetConfig",
    "GatedDeltaProduct",
    "GatedDeltaProductConfig",
    "GatedKalmaNet",
    "GatedKalmaNetConfig",
    "GatedShortConv",
    "GatedShortConvConfig",
    "GatedSlotAttention",
    "GatedSlotAttentionConfig",
    "Gla",
    "GlaConfig",
    "Gru",
    "GruConfig",
    "Hgrn",
    "Hgrn2",
    "Hgrn2Config",
    "HgrnConfig",
    "Hyena",
    "HyenaConfig",
    "JetBlock",
    "JetBlockConfig",
    "KDAConfig",
    "Layer",
    "LayerConfig",
    "LightningAttention",
    "LightningAttentionConfig",
    "LinearAttention",
    "LinearAttentionConfig",
    "LoLCATs",
    "LoLCATsConfig",
    "LogLinearGatedDeltaNet",
    "LogLinearGatedDeltaNetConfig",
    "LogLinearMamba2",
    "LogLinearMamba2Config",
    "Longformer",
    "LongformerConfig",
    "Lstm",
    "LstmConfig",
    "MLAConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "Mamba3",
    "Mamba3Config",
    "MambaConfig",
    "MesaNet",
    "MesaNetConfig",
    "MinGru",
    "MinGruConfig",
    "Mixer",
    "MixtureOfExperts",
    "MixtureOfExpertsConfig",
    "Mlp",
    "MlpConfig",
    "Mlstm",
    "MlstmConfig",
    "MoBA",
    "MoBAConfig",
    "NSAConfig",
    "PathAttention",
    "PathAttentionConfig",
    "PreconditionedGatedDeltaNet",
    "PreconditionedGatedDeltaNetConfig",
    "PreconditionedKDA",
    "PreconditionedKDAConfig",
    "Retention",
    "RetentionConfig",
    "RgLru",
    "RgLruConfig",
    "Rwkv6",
    "Rwkv6Config",
    "Rwkv7",
    "Rwkv7Config",
    "RwkvChannelMix",
    "RwkvChannelMixConfig",
    "S4d",
    "S4dConfig",
    "SlidingWindow",
    "SlidingWindowConfig",
    "Slstm",
    "SlstmConfig",
    "SparseMLA",
    "SparseMLAConfig",
    "StickBreakingAttention",
    "StickBreakingAttentionConfig",
    "SwiGlu",
    "SwiGluConfig",
    "build_channel_mixer",
    "build_mixer",
    "channel_mixer_class",
    "clone_state",
    "detach_state",
    "materialize",
    "measured_state_bytes",
    "mixer_class",
    "register_channel_mixer",
    "register_mixer",
    "state_rows",
]
