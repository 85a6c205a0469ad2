"""Mistral: ``MistralForCausalLM``, attention over a window in the first release and over all tokens since."""

from __future__ import annotations

from dataclasses import dataclass

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings):
    """Fields of ``MistralConfig``."""

    model_type = "mistral"

    num_key_value_heads: int | None = 8
    intermediate_size: int = 14336
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096


def lm_config(settings: Settings) -> LMConfig:
    mlp = {"swiglu": settings.gated_mlp()}
    return decoder.lm_config(settings, settings.attention(), mlp, window=settings.sliding_window)


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
