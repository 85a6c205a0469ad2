"""Command R: ``CohereForCausalLM``, layers whose attention and MLP stand side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.BiasSettings):
    """Fields of ``CohereConfig``."""

    model_type = "cohere"
    only: ClassVar = {**decoder.DecoderSettings.only, "use_qk_norm": False}
    aliases: ClassVar = {"layer_norm_eps": "rms_norm_eps"}
    unread = ("rms_norm_eps",)
    options: ClassVar = {"model": {"logit_scale": "logit_scale"}}

    vocab_size: int = 256000
    hidden_size: int = 8192
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    intermediate_size: int = 22528
    rms_norm_eps: float = 1e-5
    rope_theta: float | None = 500000.0
    max_position_embeddings: int = 8192
    logit_scale: float = 0.0625
    tie_word_embeddings: bool = True


def lm_config(settings: Settings) -> LMConfig:
    return decoder.lm_config(
        settings,
        settings.attention(**settings.biases()),
        {"swiglu": settings.gated_mlp()},
        norm="layer_without_bias",
        parallel="one_norm",
        logit_scale=float(settings.logit_scale),
    )


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    rules = {name: parts.attention(options, pairs=True) for name, options in config.mixers.items()}
    tables = {name: under("self_attn.", "mixers.0.", each) for name, each in rules.items()}
    return parts.decoder(config, tables, {"norm": "input_layernorm"})
