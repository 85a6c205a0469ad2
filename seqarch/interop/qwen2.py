"""Qwen2 and Qwen2.5: ``Qwen2ForCausalLM``, with biases in the projections to queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.SomeWindowsSettings):
    """Fields of ``Qwen2Config``."""

    model_type = "qwen2"
    in_files_only = (*decoder.DecoderSettings.in_files_only, *decoder.SomeWindowsSettings.in_files_only)

    vocab_size: int = 151936
    num_key_value_heads: int | None = 32
    intermediate_size: int = 22016
    max_position_embeddings: int = 32768


def lm_config(settings: Settings) -> LMConfig:
    return decoder.lm_config(
        settings,
        settings.attention(qkv_bias=True),
        {"swiglu": settings.gated_mlp()},
        kinds=settings.window_kinds(),
        window=settings.sliding_window,
    )


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
