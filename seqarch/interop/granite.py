"""Granite 3.x: ``GraniteForCausalLM``, Llama with constant multipliers."""

from __future__ import annotations

from dataclasses import dataclass

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.MultiplierSettings, decoder.BiasSettings):
    """Fields of ``GraniteConfig``."""

    model_type = "granite"

    mlp_bias: bool = False


def lm_config(settings: Settings) -> LMConfig:
    attention = settings.attention(**settings.biases(), **settings.score_scale())
    mlp = settings.gated_mlp(bias=settings.mlp_bias)
    return decoder.lm_config(settings, attention, {"swiglu": mlp}, **settings.multipliers("attention", "swiglu"))


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
