"""OLMoE: ``OlmoeForCausalLM``, experts, and norms over all heads of queries and of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.BiasSettings):
    """Fields of ``OlmoeConfig``."""

    model_type = "olmoe"
    aliases: ClassVar = {"num_local_experts": "num_experts"}
    options: ClassVar = {
        "attention": {"qkv_clip": "clip_qkv"},
        "moe": {
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "intermediate_size",
            "normalise_weights": "norm_topk_prob",
        },
    }

    vocab_size: int = 50304
    hidden_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    intermediate_size: int = 2048
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    clip_qkv: float | None = None


def lm_config(settings: Settings) -> LMConfig:
    parts.check_top_k(settings, "num_experts_per_tok", settings.norm_topk_prob)
    norms = {"qk_norm": True, "qk_norm_scope": "all", "norm_eps": settings.rms_norm_eps}
    moe = {**settings.options_of("moe"), **settings.activation()}
    attention = settings.attention(**settings.options_of("attention"), **norms, **settings.biases())
    return decoder.lm_config(settings, attention, {"moe": moe})


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
