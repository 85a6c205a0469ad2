"""Mamba: ``MambaForCausalLM``."""

from __future__ import annotations

from seqarch.interop import parts
from seqarch.interop.parts import model, norm, short_convolution
from seqarch.interop.settings import Settings
from seqarch.interop.weights import WeightMap, rule, under
from seqarch.models import LMConfig


def lm_config(settings: Settings) -> LMConfig:
    settings.only(hidden_act="silu", use_bias=False, use_conv_bias=True)
    rank = settings.get("time_step_rank", default="auto")
    options = {
        "d_state": settings.get("state_size"),
        "expand": settings.get("expand"),
        "conv_width": settings.get("conv_kernel"),
        "dt_rank": None if rank == "auto" else rank,
    }
    return parts.lm_config(settings, ["mamba/none"] * settings.get("num_hidden_layers"), {"mamba": options}, tied=True)


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    mixer = [
        rule("in_proj.weight", "in_proj.weight"),
        *short_convolution("conv1d", "conv", bias=True),
        rule("x_proj.weight", "select.weight"),
        rule("dt_proj.weight", "dt.weight"),
        rule("dt_proj.bias", "dt.bias"),
        rule("A_log", "A_log"),
        rule("D", "D"),
        rule("out_proj.weight", "out_proj.weight"),
    ]
    layer = [norm("norm.weight"), *under("mixer.", "mixers.0.", mixer)]
    last = norm("backbone.norm_f.weight")
    return model(config, [layer] * config.depth, "backbone.embeddings.weight", last, "backbone.layers")
