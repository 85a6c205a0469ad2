"""Granite 4: ``GraniteMoeHybridForCausalLM``, Mamba-2 and attention with a mixture of experts and multipliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import decoder, mamba2, parts
from seqarch.interop.bamba import SsmSettings
from seqarch.interop.weights import WeightMap, rule, under
from seqarch.models import LMConfig

MIXERS = {"mamba": "mamba2", "linear_attention": "mamba2", "attention": "attention", "full_attention": "attention"}


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.BiasSettings, decoder.MultiplierSettings, SsmSettings):
    """Fields of ``GraniteMoeHybridConfig``."""

    model_type = "granitemoehybrid"
    only: ClassVar = {**SsmSettings.only, **decoder.DecoderSettings.only}
    aliases: ClassVar = {"layers_block_type": "layer_types"}
    may_be_zero = ("num_local_experts",)
    options: ClassVar = {
        "moe": {
            "num_experts": "num_local_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "intermediate_size",
            "shared_hidden": "shared_intermediate_size",
        }
    }
    layer_kinds: ClassVar = {"layer_types": MIXERS}

    layer_types: list[str] | None = None
    position_embedding_type: str | None = None
    shared_intermediate_size: int = 1024
    num_local_experts: int = 8
    num_experts_per_tok: int = 2


def lm_config(settings: Settings) -> LMConfig:
    routed, depth = settings.num_local_experts > 0, settings.num_hidden_layers
    parts.check_top_k(settings, "num_experts_per_tok", normalised=routed)
    others = {**settings.score_scale(), **settings.biases()}
    turned = settings.position_embedding_type == "rope"
    attention = settings.attention(**others) if turned else {**settings.heads(), "position": "none", **others}
    moe = {**settings.options_of("moe"), "shared_experts": 1}
    entries = ["linear_attention"] * depth if settings.layer_types is None else settings.layer_types
    channel, options = ("moe", moe) if routed else ("swiglu", {"hidden": settings.shared_intermediate_size})
    return parts.lm_config(
        settings,
        [f"{mixer}/{channel}" for mixer in settings.chosen("layer_types", MIXERS, entries, depth)],
        {"attention": attention, "mamba2": settings.ssm()},
        {channel: options},
        **settings.multipliers("attention", "mamba2", channel),
    )


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    routed = "moe" in config.channels
    dense = "channel.shared" if routed else "channel"
    channel = [
        rule("shared_mlp.input_linear.weight", f"{dense}.in_proj.weight"),
        rule("shared_mlp.output_linear.weight", f"{dense}.out_proj.weight"),
    ]
    if routed:
        channel += parts.experts(settings.intermediate_size, "block_sparse_moe.", "router")
    mixer = under("mamba.", "mixers.0.", mamba2.mixer())
    return parts.decoder(config, {"mamba2": mixer, "moe": channel, "swiglu": channel})
