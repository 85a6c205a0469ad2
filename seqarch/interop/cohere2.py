"""Command R7B and Command A: ``Cohere2ForCausalLM``, of whose layers those over all tokens know no positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.LayerTypeSettings, decoder.BiasSettings):
    """Fields of ``Cohere2Config``."""

    model_type = "cohere2"
    in_files_only = (*decoder.DecoderSettings.in_files_only, "sliding_window_pattern")
    aliases: ClassVar = {"layer_norm_eps": "rms_norm_eps"}
    unread = ("rms_norm_eps",)
    options: ClassVar = {"model": {"logit_scale": "logit_scale"}}

    vocab_size: int = 256000
    hidden_size: int = 8192
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    intermediate_size: int = 22528
    rms_norm_eps: float = 1e-5
    sliding_window_pattern: int = 4
    max_position_embeddings: int = 8192
    logit_scale: float = 0.0625
    tie_word_embeddings: bool = True


def lm_config(settings: Settings) -> LMConfig:
    depth, every = settings.num_hidden_layers, settings.sliding_window_pattern
    attention = settings.attention(**settings.biases())
    still = {**attention, "position": "none"}
    still.pop("rope_scaling", None)
    return decoder.lm_config(
        settings,
        still,
        {"swiglu": settings.gated_mlp()},
        kinds=settings.kinds([decoder.SLIDING if (i + 1) % every else decoder.FULL for i in range(depth)]),
        window=settings.sliding_window,
        sliding=attention,
        norm="layer_without_bias",
        parallel="one_norm",
        logit_scale=float(settings.logit_scale),
    )


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    rules = {name: parts.attention(options, pairs=True) for name, options in config.mixers.items()}
    tables = {name: under("self_attn.", "mixers.0.", each) for name, each in rules.items()}
    return parts.decoder(config, tables, {"norm": "input_layernorm"})
