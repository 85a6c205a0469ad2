"""Phi-3, Phi-3.5 and Phi-4: ``Phi3ForCausalLM``, with joined projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.settings import PartialRotarySettings
from seqarch.interop.weights import WeightMap, rule, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, PartialRotarySettings):
    """Fields of ``Phi3Config``."""

    model_type = "phi3"
    only: ClassVar = {**decoder.DecoderSettings.only, "resid_pdrop": 0.0}
    rope_types = ("default", "longrope")
    rope_aliases: ClassVar = {"su": "longrope", "yarn": "longrope"}

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int | None = 4096
    sliding_window: int | None = None


def lm_config(settings: Settings) -> LMConfig:
    mlp = {"swiglu": settings.gated_mlp()}
    return decoder.lm_config(settings, settings.attention(), mlp, window=settings.sliding_window)


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    attention = [under("self_attn.", "mixers.0.", parts.attention(each, "qkv_proj")) for each in config.mixers.values()]
    mlp = [
        rule("mlp.gate_up_proj.weight", "channel.in_proj.weight"),
        rule("mlp.down_proj.weight", "channel.out_proj.weight"),
    ]
    return parts.decoder(config, {**dict(zip(config.mixers, attention, strict=True)), "swiglu": mlp})
