"""Jamba: ``JambaForCausalLM``, Mamba with attention in some layers and a mixture of experts in others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import mamba, parts
from seqarch.interop.parts import experts, gated_mlp
from seqarch.interop.settings import BaseSettings
from seqarch.interop.weights import WeightMap, rule, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Fields of ``JambaConfig``."""

    model_type = "jamba"
    only: ClassVar = {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }
    aliases: ClassVar = {"num_local_experts": "num_experts"}
    may_be_zero = ("attn_layer_offset", "expert_layer_offset")
    options: ClassVar = {
        "model": {"norm_eps": "rms_norm_eps"},
        "attention": {
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
        },
        "mamba": {"d_state": "mamba_d_state", "conv_width": "mamba_d_conv", "norm_eps": "rms_norm_eps"},
        "moe": {"num_experts": "num_experts", "top_k": "num_experts_per_tok", "hidden": "intermediate_size"},
        "swiglu": {"hidden": "intermediate_size"},
    }

    vocab_size: int = 65536
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_dt_rank: int | str = "auto"
    intermediate_size: int = 14336
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    num_experts: int = 16
    num_experts_per_tok: int = 2
    rms_norm_eps: float = 1e-6


def lm_config(settings: Settings) -> LMConfig:
    heads = settings.num_attention_heads
    options = {
        **settings.options_of("attention"),
        "num_kv_heads": settings.num_key_value_heads or heads,
        "head_dim": settings.head_dim or settings.hidden_size // heads,
        "position": "none",
    }
    ssm = {
        **settings.options_of("mamba"),
        "d_inner": settings.mamba_expand * settings.hidden_size,
        "dt_rank": mamba.dt_rank(settings, "mamba_dt_rank"),
        "dt_bc_norm": "rms",
    }
    moe = {**settings.options_of("moe"), "normalise_weights": False}
    return parts.lm_config(
        settings,
        _layers(settings),
        {"attention": options, "mamba": ssm},
        {"moe": moe, "swiglu": settings.options_of("swiglu")},
    )


def _layers(settings: Settings) -> list[str]:
    """Each layer's mixer and channel mixer, as a pattern."""
    sparse = settings.num_experts > 1
    layers = []
    for i in range(settings.num_hidden_layers):
        full = i % settings.attn_layer_period == settings.attn_layer_offset
        routed = sparse and i % settings.expert_layer_period == settings.expert_layer_offset
        layers.append(f"{'attention' if full else 'mamba'}/{'moe' if routed else 'swiglu'}")
    return layers


def weights(settings: Settings) -> WeightMap:
    normed = [rule(f"{part.lower()}_layernorm.weight", f"{part}_norm.weight") for part in ("dt", "B", "C")]
    tables = {
        "mamba": under("mamba.", "mixers.0.", [*mamba.mixer(), *normed]),
        "moe": experts(settings.intermediate_size, "feed_forward.", "router"),
        "swiglu": gated_mlp(settings.intermediate_size, "feed_forward."),
    }
    norms = {"norm": "input_layernorm", "channel_norm": "pre_ff_layernorm"}
    return parts.decoder(lm_config(settings), tables, norms, last_norm="model.final_layernorm")
