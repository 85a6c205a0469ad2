"""Mixtral: ``MixtralForCausalLM``, grouped-query attention and a mixture of experts."""

from __future__ import annotations

from typing import Any

from seqarch.interop import parts
from seqarch.interop.parts import attention, experts, model, norm
from seqarch.interop.settings import Settings
from seqarch.interop.weights import WeightMap, under
from seqarch.models import LMConfig


def lm_config(settings: Settings) -> LMConfig:
    settings.only(hidden_act="silu")
    heads = settings.get("num_attention_heads")
    options: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": settings.get("num_key_value_heads", default=heads),
        "head_dim": settings.get("head_dim", default=settings.get("hidden_size") // heads),
        **settings.rotary(base=1e6),
    }
    window = settings.get("sliding_window", default=None)
    mixer = "attention" if window is None else "sliding_window"
    moe = {
        "num_experts": settings.get("num_local_experts", "num_experts"),
        "top_k": settings.get("num_experts_per_tok"),
        "hidden": settings.get("intermediate_size"),
    }
    return parts.lm_config(
        settings,
        [f"{mixer}/moe"] * settings.get("num_hidden_layers"),
        {mixer: options if window is None else {**options, "window": window}},
        {"moe": moe},
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
