"""Qwen3-MoE: ``Qwen3MoeForCausalLM``, Qwen3 with experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.BiasSettings, decoder.SparseSettings):
    """Fields of ``Qwen3MoeConfig``."""

    model_type = "qwen3_moe"
    aliases: ClassVar = {"num_local_experts": "num_experts"}
    in_files_only = (*decoder.DecoderSettings.in_files_only, "use_sliding_window")
    in_objects: ClassVar = {"use_sliding_window": None}

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_key_value_heads: int | None = 4
    intermediate_size: int = 6144
    max_position_embeddings: int = 32768
    use_sliding_window: bool | None = False
    sliding_window: int | None = 4096


def lm_config(settings: Settings) -> LMConfig:
    return decoder.lm_config(
        settings,
        settings.attention(qk_norm=True, norm_eps=settings.rms_norm_eps, **settings.biases()),
        {"moe": settings.experts(**settings.activation()), "swiglu": settings.gated_mlp()},
        each_channel=settings.channels(),
        window=None if settings.use_sliding_window is False else settings.sliding_window,
    )


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
