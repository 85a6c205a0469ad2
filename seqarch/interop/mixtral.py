"""Mixtral: ``MixtralForCausalLM``, grouped-query attention and a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from seqarch.interop import parts
from seqarch.interop.parts import attention, experts, model, norm
from seqarch.interop.settings import RotarySettings
from seqarch.interop.weights import WeightMap, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(RotarySettings):
    """Fields of ``MixtralConfig``."""

    model_type = "mixtral"
    only: ClassVar = {"hidden_act": "silu", "attention_dropout": 0.0, "router_jitter_noise": 0.0}
    aliases: ClassVar = {"num_experts": "num_local_experts"}

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    sliding_window: int | None = None
    intermediate_size: int = 14336
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    rms_norm_eps: float = 1e-5
    rope_theta: float | None = 1e6


def lm_config(settings: Settings) -> LMConfig:
    parts.check_top_k(settings, "num_experts_per_tok", normalised=True)
    heads, window = settings.num_attention_heads, settings.sliding_window
    width = settings.head_dim or settings.hidden_size // heads
    options: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": settings.num_key_value_heads or heads,
        "head_dim": width,
        **settings.rotary(width),
    }
    mixer = "attention" if window is None else "sliding_window"
    moe = {
        "num_experts": settings.num_local_experts,
        "top_k": settings.num_experts_per_tok,
        "hidden": settings.intermediate_size,
    }
    return parts.lm_config(
        settings,
        [f"{mixer}/moe"] * settings.num_hidden_layers,
        {mixer: options if window is None else {**options, "window": window}},
        {"moe": moe},
        norm_eps=settings.rms_norm_eps,
    )


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    (options,) = config.mixers.values()
    layer = [
        norm("input_layernorm.weight"),
        *under("self_attn.", "mixers.0.", attention(options)),
        norm("post_attention_layernorm.weight", "channel_norm.weight"),
        *experts(config.channels["moe"]["hidden"]),
    ]
    return model(config, [layer] * config.depth, "model.embed_tokens.weight", norm("model.norm.weight"))
