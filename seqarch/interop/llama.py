"""Llama, versions 1 to 3.x: ``LlamaForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.BiasSettings):
    """Fields of ``LlamaConfig``."""

    model_type = "llama"

    mlp_bias: bool = False


def lm_config(settings: Settings) -> LMConfig:
    attention, mlp = settings.attention(**settings.biases()), settings.gated_mlp(bias=settings.mlp_bias)
    return decoder.lm_config(settings, attention, {"swiglu": mlp})


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
