"""StarCoder2: ``Starcoder2ForCausalLM``, layer norms, biases and an MLP without gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings):
    """Fields of ``Starcoder2Config``."""

    model_type = "starcoder2"
    only: ClassVar = {**decoder.DecoderSettings.only, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    aliases: ClassVar = {"norm_epsilon": "rms_norm_eps"}
    unread = ("rms_norm_eps",)

    vocab_size: int = 49152
    hidden_size: int = 3072
    num_hidden_layers: int = 30
    num_attention_heads: int = 24
    num_key_value_heads: int | None = 2
    intermediate_size: int = 12288
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    use_bias: bool = True
    tie_word_embeddings: bool = True


def lm_config(settings: Settings) -> LMConfig:
    bias = settings.use_bias
    return decoder.lm_config(
        settings,
        settings.attention(qkv_bias=bias, output_bias=bias),
        {"mlp": settings.plain_mlp(bias=bias)},
        window=settings.sliding_window,
        norm="layer",
    )


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
