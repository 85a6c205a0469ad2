"""Granite 3.x with experts: ``GraniteMoeForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.MultiplierSettings, decoder.BiasSettings):
    """Fields of ``GraniteMoeConfig``."""

    model_type = "granitemoe"
    options: ClassVar = {
        "moe": {
            "num_experts": "num_local_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "intermediate_size",
        }
    }

    num_local_experts: int = 8
    num_experts_per_tok: int = 2


def lm_config(settings: Settings) -> LMConfig:
    parts.check_top_k(settings, "num_experts_per_tok", normalised=True)
    attention = settings.attention(**settings.biases(), **settings.score_scale())
    moe = {**settings.options_of("moe"), **settings.activation()}
    return decoder.lm_config(settings, attention, {"moe": moe}, **settings.multipliers("attention", "moe"))


def weights(settings: Settings) -> WeightMap:
    experts = parts.experts(settings.intermediate_size, "block_sparse_moe.", "router")
    return parts.decoder(lm_config(settings), {"moe": experts})
