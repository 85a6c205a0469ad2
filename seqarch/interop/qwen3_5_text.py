"""Qwen3.5 on text: ``Qwen3_5ForCausalLM``, Gated DeltaNet and gated attention with a gated MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seqarch.interop import parts, qwen3_next
from seqarch.interop.parts import norm, short_convolution
from seqarch.interop.weights import Rule, WeightMap, concatenate, rule, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(qwen3_next.MixerSettings):
    """Fields of ``Qwen3_5TextConfig``.

    Positions of several axes (``mrope_section``) are one for text, so that the sections are not read.
    """

    model_type = "qwen3_5_text"

    vocab_size: int = 248320
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_key_value_heads: int = 4
    intermediate_size: int = 12288


def lm_config(settings: Settings) -> LMConfig:
    return model_of(settings, {"swiglu": settings.options_of("swiglu")})


def model_of(settings: qwen3_next.MixerSettings, channels: dict[str, dict[str, Any]]) -> LMConfig:
    """Our configuration with this one channel mixer in all layers."""
    (channel,) = channels
    return parts.lm_config(
        settings,
        [f"{mixer}/{channel}" for mixer in qwen3_next.mixers(settings)],
        qwen3_next.mixer_options(settings),
        channels,
        zero_centred_norms=True,
    )


def _delta(options: dict[str, Any]) -> list[Rule]:
    heads = options["num_heads"]
    return [
        rule("in_proj_qkv.weight", "qkv_proj.linear.weight"),
        rule("in_proj_z.weight", "gate.weight"),
        rule(["in_proj_a.weight", "in_proj_b.weight"], "ab_proj.weight", concatenate(heads, heads)),
        *short_convolution("conv1d", "qkv_proj.conv", bias=False),
        *(rule(name, name) for name in ("A_log", "dt_bias")),
        norm("norm.weight"),
        rule("out_proj.weight", "out_proj.weight"),
    ]


def tables(config: LMConfig) -> dict[str, list[Rule]]:
    """Rules of the mixers."""
    attention = qwen3_next.attention_rules(config.mixers["attention"])
    return {
        "attention": under("self_attn.", "mixers.0.", attention),
        "gated_delta_net": under("linear_attn.", "mixers.0.", _delta(config.mixers["gated_delta_net"])),
    }


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    return parts.decoder(config, tables(config))
