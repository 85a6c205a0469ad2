"""Gemma 3 without images: ``Gemma3ForCausalLM``, five layers over a window before each over all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.ByKindSettings, decoder.BiasSettings):
    """Fields of ``Gemma3TextConfig``."""

    model_type = "gemma3_text"
    only: ClassVar = {**decoder.DecoderSettings.only, "use_bidirectional_attention": False}
    aliases: ClassVar = {"hidden_activation": "hidden_act", "rope_local_base_freq": "local_theta"}
    unread = ("hidden_act", *decoder.ByKindSettings.unread)
    options: ClassVar = {"model": {"logit_cap": "final_logit_softcapping"}}
    in_files_only = (*decoder.DecoderSettings.in_files_only, "rope_local_base_freq", "sliding_window_pattern")

    vocab_size: int = 262208
    hidden_size: int = 2304
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    intermediate_size: int = 9216
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    rope_theta: float | None = 1e6
    sliding_window_pattern: int = 6
    query_pre_attn_scalar: int = 256
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None
    tie_word_embeddings: bool = True


def lm_config(settings: Settings) -> LMConfig:
    depth, every = settings.num_hidden_layers, settings.sliding_window_pattern
    attention = {
        "scale": settings.query_pre_attn_scalar**-0.5,
        "logit_cap": settings.attn_logit_softcapping,
        "qk_norm": True,
        "norm_eps": settings.rms_norm_eps,
        "zero_centred_norms": True,
        **settings.biases(),
    }
    return decoder.lm_config(
        settings,
        settings.attention_of(decoder.FULL, **attention),
        {"swiglu": settings.gated_mlp()},
        kinds=settings.kinds([decoder.SLIDING if (i + 1) % every else decoder.FULL for i in range(depth)]),
        window=settings.sliding_window,
        sliding=settings.attention_of(decoder.SLIDING, **attention),
        norm_placement="both",
        zero_centred_norms=True,
        embedding_scale=settings.hidden_size**0.5,
    )


def weights(settings: Settings) -> WeightMap:
    return parts.decoder(lm_config(settings))
