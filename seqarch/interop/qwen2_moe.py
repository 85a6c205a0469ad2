"""Qwen2-MoE: ``Qwen2MoeForCausalLM``, Qwen2 with experts, of which one, shared and gated, serves every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap, rule
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.SparseSettings, decoder.SomeWindowsSettings):
    """Fields of ``Qwen2MoeConfig``."""

    model_type = "qwen2_moe"
    in_files_only = (*decoder.DecoderSettings.in_files_only, *decoder.SomeWindowsSettings.in_files_only)
    may_be_zero: ClassVar = ("sliding_window",)
    options: ClassVar = {
        "attention": {"qkv_bias": "qkv_bias"},
        "sliding_window": {"qkv_bias": "qkv_bias"},
        "moe": {"shared_hidden": "shared_expert_intermediate_size"},
    }

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    intermediate_size: int = 5632
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    num_experts: int = 60
    num_experts_per_tok: int = 4
    max_position_embeddings: int = 32768
    qkv_bias: bool = True


def lm_config(settings: Settings) -> LMConfig:
    depth = settings.num_hidden_layers
    last = settings.max_window_layers if settings.use_sliding_window else 0
    kinds = settings.kinds([decoder.SLIDING if i % 2 == 0 and i < last else decoder.FULL for i in range(depth)])
    shared = {"shared_experts": 1, "shared_gate": True}
    return decoder.lm_config(
        settings,
        settings.attention(**settings.options_of("attention")),
        {"moe": settings.experts(**shared, **settings.activation()), "swiglu": settings.gated_mlp()},
        kinds=kinds,
        each_channel=settings.channels(),
        window=settings.sliding_window,
    )


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    experts = parts.experts(settings.moe_intermediate_size)
    shared = parts.gated_mlp(settings.shared_expert_intermediate_size, "mlp.shared_expert.", "channel.shared.")
    gate = rule("mlp.shared_expert_gate.weight", "channel.shared_gate.weight")
    return parts.decoder(config, {"moe": [*experts, *shared, gate]})
