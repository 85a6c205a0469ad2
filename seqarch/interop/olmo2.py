"""OLMo 2: ``Olmo2ForCausalLM``, norms after the mixers, and of all heads of queries and of keys."""

from __future__ import annotations

from dataclasses import dataclass

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.BiasSettings):
    """Fields of ``Olmo2Config``."""

    model_type = "olmo2"

    vocab_size: int = 50304
    rms_norm_eps: float = 1e-5


def lm_config(settings: Settings) -> LMConfig:
    norms = {"qk_norm": True, "qk_norm_scope": "all", "norm_eps": settings.rms_norm_eps}
    attention = settings.attention(**norms, **settings.biases())
    return decoder.lm_config(settings, attention, {"swiglu": settings.gated_mlp()}, norm_placement="post")


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
