"""OLMo, the first: ``OlmoForCausalLM``, layer norms without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.BiasSettings):
    """Fields of ``OlmoConfig``."""

    model_type = "olmo"
    unread = ("rms_norm_eps",)
    options: ClassVar = {"attention": {"qkv_clip": "clip_qkv"}}

    vocab_size: int = 50304
    clip_qkv: float | None = None
    rms_norm_eps: float = 1e-5


def lm_config(settings: Settings) -> LMConfig:
    attention = settings.attention(**settings.options_of("attention"), **settings.biases())
    return decoder.lm_config(settings, attention, {"swiglu": settings.gated_mlp()}, norm="layer_without_weights")


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
