"""Gemma: ``GemmaForCausalLM``, a scaled embedding and norms that multiply by ``1 + weight``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.BiasSettings):
    """Fields of ``GemmaConfig``."""

    model_type = "gemma"
    only: ClassVar = {**decoder.DecoderSettings.only, "use_bidirectional_attention": None}

    vocab_size: int = 256000
    hidden_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    head_dim: int | None = 256
    intermediate_size: int = 24576
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True

    @classmethod
    def read(cls, config: Any) -> Self:
        """As :meth:`BaseSettings.read`; the GELU of files, whose first ones say ``"gelu"``, is the one by tanh."""
        if isinstance(config, Mapping) and config.get("hidden_act") == "gelu":
            config = {**config, "hidden_act": "gelu_pytorch_tanh"}
        return super().read(config)


def lm_config(settings: Settings) -> LMConfig:
    return decoder.lm_config(
        settings,
        settings.attention(**settings.biases()),
        {"swiglu": settings.gated_mlp()},
        zero_centred_norms=True,
        embedding_scale=settings.hidden_size**0.5,
    )


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
