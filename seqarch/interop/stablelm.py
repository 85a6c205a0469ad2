"""StableLM 2 and StableLM 3B: ``StableLmForCausalLM``, layer norms, and a quarter of each head turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.settings import PartialRotarySettings
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, PartialRotarySettings):
    """Fields of ``StableLmConfig``."""

    model_type = "stablelm"
    only: ClassVar = {
        **decoder.DecoderSettings.only,
        "hidden_dropout": 0.0,
        "qk_layernorm": False,
    }
    aliases: ClassVar = {"layer_norm_eps": "rms_norm_eps"}
    unread = ("rms_norm_eps",)
    options: ClassVar = {"attention": {"qkv_bias": "use_qkv_bias"}}

    vocab_size: int = 50304
    hidden_size: int = 2560
    num_key_value_heads: int | None = 32
    intermediate_size: int = 6912
    max_position_embeddings: int = 4096
    partial_rotary_factor: float | None = 0.25
    rms_norm_eps: float = 1e-5
    use_qkv_bias: bool = False
    use_parallel_residual: bool = False


def lm_config(settings: Settings) -> LMConfig:
    attention = settings.attention(**settings.options_of("attention"))
    parallel = "one_norm" if settings.use_parallel_residual else "none"
    return decoder.lm_config(settings, attention, {"swiglu": settings.gated_mlp()}, norm="layer", parallel=parallel)


def weights(settings: Settings) -> WeightMap:
    norms = {"norm": "input_layernorm"} if settings.use_parallel_residual else None
    return parts.decoder(lm_config(settings), norms=norms)
