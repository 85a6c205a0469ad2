"""Falcon-H1: ``FalconH1ForCausalLM``, attention and Mamba-2 side by side, with maximal-update multipliers."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

from seqarch.interop import mamba2, parts
from seqarch.interop.parts import attention, gated_mlp, model, norm
from seqarch.interop.settings import RotarySettings
from seqarch.interop.weights import WeightMap, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(RotarySettings):
    """Fields of ``FalconH1Config``."""

    model_type = "falcon_h1"
    only: ClassVar = {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "projectors_bias": False,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
        "time_step_limit": [0.0, inf],
    }

    vocab_size: int = 128000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    intermediate_size: int = 14336
    mamba_d_ssm: int | None = 1024
    mamba_expand: int = 2
    mamba_n_heads: int = 128
    mamba_d_head: int | str = "auto"
    mamba_n_groups: int = 1
    mamba_d_state: int = 256
    mamba_d_conv: int = 4
    mamba_norm_before_gate: bool | None = True
    mamba_rms_norm: bool | None = False
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    embedding_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    key_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    ssm_in_multiplier: float = 1.0
    ssm_multipliers: list[float] | None = None
    ssm_out_multiplier: float = 1.0
    mlp_multipliers: list[float] | None = None
    lm_head_multiplier: float = 1.0


def lm_config(settings: Settings) -> LMConfig:
    gate, down = settings.factors("mlp_multipliers", 2)
    return parts.lm_config(
        settings,
        ["attention+mamba2/swiglu"] * settings.num_hidden_layers,
        {"attention": _attention(settings), "mamba2": _ssm(settings)},
        {"swiglu": {"hidden": settings.intermediate_size, "gate_factor": gate}},
        norm_eps=settings.rms_norm_eps,
        branch_weights=False,
        input_factors=_but_1(attention=settings.attention_in_multiplier, mamba2=settings.ssm_in_multiplier),
        output_factors=_but_1(
            attention=settings.attention_out_multiplier, mamba2=settings.ssm_out_multiplier, swiglu=down
        ),
        embedding_scale=settings.embedding_multiplier,
        logit_scale=settings.lm_head_multiplier,
    )


def _but_1(**factors: float) -> dict[str, float]:
    """Without those that change nothing."""
    return {name: factor for name, factor in factors.items() if factor != 1}


def _attention(settings: Settings) -> dict[str, Any]:
    heads = settings.num_attention_heads
    width = settings.head_dim or settings.hidden_size // heads
    rotary = settings.rotary(width)  # first, as it refuses a width of 0
    return {
        "num_heads": heads,
        "num_kv_heads": settings.num_key_value_heads or heads,
        "head_dim": width,
        "scale": None if settings.key_multiplier == 1 else settings.key_multiplier * width**-0.5,
        **rotary,
    }


def _ssm(settings: Settings) -> dict[str, Any]:
    inner = settings.mamba_d_ssm or settings.mamba_expand * settings.hidden_size
    width = inner // settings.mamba_n_heads
    if settings.mamba_d_head not in ("auto", width):
        channels = "mamba_d_ssm or mamba_expand times hidden_size"
        raise settings.refuse("mamba_d_head", f"'auto' or {width}: {channels} is {inner}, over mamba_n_heads")
    factors = settings.factors("ssm_multipliers", 5)
    gated = "gate_last" if settings.mamba_norm_before_gate else "gate_first"
    return {
        "d_state": settings.mamba_d_state,
        "head_dim": width,
        "d_inner": inner,
        "n_groups": settings.mamba_n_groups,
        "conv_width": settings.mamba_d_conv,
        "in_factors": None if all(factor == 1 for factor in factors) else factors,
        "output_norm": gated if settings.mamba_rms_norm else "none",
        "norm_eps": settings.rms_norm_eps,
    }


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    layer = [
        norm("input_layernorm.weight"),
        *under("self_attn.", "mixers.0.", attention(config.mixers["attention"])),
        *under("mamba.", "mixers.1.", mamba2.mixer(normed=bool(settings.mamba_rms_norm))),
        norm("pre_ff_layernorm.weight", "channel_norm.weight"),
        *gated_mlp(settings.intermediate_size, "feed_forward."),
    ]
    return model(config, [layer] * config.depth, "model.embed_tokens.weight", norm("model.final_layernorm.weight"))
