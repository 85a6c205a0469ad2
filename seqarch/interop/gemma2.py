"""Gemma 2: ``Gemma2ForCausalLM``, norms before and after each mixer, bounded scores and logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.LayerTypeSettings, decoder.BiasSettings):
    """Fields of ``Gemma2Config``."""

    model_type = "gemma2"
    only: ClassVar = {**decoder.DecoderSettings.only, "use_bidirectional_attention": None}
    aliases: ClassVar = {"hidden_activation": "hidden_act"}
    unread = ("hidden_act",)
    options: ClassVar = {"model": {"logit_cap": "final_logit_softcapping"}}

    vocab_size: int = 256000
    hidden_size: int = 2304
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    intermediate_size: int = 9216
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    query_pre_attn_scalar: int = 256
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    tie_word_embeddings: bool = True


def lm_config(settings: Settings) -> LMConfig:
    depth = settings.num_hidden_layers
    scores = {"scale": settings.query_pre_attn_scalar**-0.5, "logit_cap": settings.attn_logit_softcapping}
    return decoder.lm_config(
        settings,
        settings.attention(**scores, **settings.biases()),
        {"swiglu": settings.gated_mlp()},
        kinds=settings.kinds([decoder.FULL if i % 2 else decoder.SLIDING for i in range(depth)]),
        window=settings.sliding_window,
        norm_placement="both",
        zero_centred_norms=True,
        embedding_scale=settings.hidden_size**0.5,
    )


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
