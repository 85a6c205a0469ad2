"""Mamba-2: ``Mamba2ForCausalLM``."""

from __future__ import annotations

from math import inf

from seqarch.interop import parts
from seqarch.interop.parts import model, norm, short_convolution
from seqarch.interop.settings import Settings
from seqarch.interop.weights import Rule, WeightMap, rule, under
from seqarch.models import LMConfig


def lm_config(settings: Settings) -> LMConfig:
    settings.only(hidden_act="silu", use_bias=False, use_conv_bias=True, time_step_limit=(0.0, inf))
    options = {
        "d_state": settings.get("state_size"),
        "head_dim": settings.get("head_dim"),
        "d_inner": settings.get("num_heads") * settings.get("head_dim"),
        "n_groups": settings.get("n_groups"),
        "conv_width": settings.get("conv_kernel"),
        "norm_eps": settings.get("layer_norm_epsilon"),
    }
    return parts.lm_config(settings, ["mamba2/none"] * settings.get("num_hidden_layers"), {"mamba2": options})


def mixer(normed: bool = True) -> list[Rule]:
    """Rules of the mixer but for its two projections; ``normed`` where its output has a norm."""
    own = [rule(name, name) for name in ("A_log", "D", "dt_bias", *(["norm.weight"] if normed else []))]
    return [*own, *short_convolution("conv1d", "conv", bias=True)]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    rules = [rule("in_proj.weight", "in_proj.weight"), rule("out_proj.weight", "out_proj.weight"), *mixer()]
    layer = [norm("norm.weight"), *under("mixer.", "mixers.0.", rules)]
    last = norm("backbone.norm_f.weight")
    return model(config, [layer] * config.depth, "backbone.embeddings.weight", last, "backbone.layers")
