"""Mixtral: ``MixtralForCausalLM``, grouped-query attention and a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings):
    """Fields of ``MixtralConfig``."""

    model_type = "mixtral"
    only: ClassVar = {**decoder.DecoderSettings.only, "router_jitter_noise": 0.0}
    aliases: ClassVar = {"num_experts": "num_local_experts"}
    options: ClassVar = {
        "moe": {
            "num_experts": "num_local_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "intermediate_size",
        }
    }

    num_key_value_heads: int | None = 8
    sliding_window: int | None = None
    intermediate_size: int = 14336
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    rms_norm_eps: float = 1e-5
    rope_theta: float | None = 1e6
    max_position_embeddings: int = 131072


def lm_config(settings: Settings) -> LMConfig:
    parts.check_top_k(settings, "num_experts_per_tok", normalised=True)
    moe = {**settings.options_of("moe"), **settings.activation()}
    return decoder.lm_config(settings, settings.attention(), {"moe": moe}, window=settings.sliding_window)


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
