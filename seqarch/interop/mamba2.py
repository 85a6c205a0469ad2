"""Mamba-2: ``Mamba2ForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

from seqarch.interop import parts
from seqarch.interop.parts import model, norm, short_convolution
from seqarch.interop.settings import BaseSettings
from seqarch.interop.weights import Rule, WeightMap, rule, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Fields of ``Mamba2Config``."""

    model_type = "mamba2"
    only: ClassVar = {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "time_step_limit": [0.0, inf]}
    options: ClassVar = {
        "model": {"norm_eps": "layer_norm_epsilon"},
        "mamba2": {
            "d_state": "state_size",
            "head_dim": "head_dim",
            "n_groups": "n_groups",
            "conv_width": "conv_kernel",
            "norm_eps": "layer_norm_epsilon",
        },
    }

    vocab_size: int = 32768
    hidden_size: int = 4096
    num_hidden_layers: int = 64
    num_heads: int = 128
    head_dim: int = 64
    state_size: int = 128
    n_groups: int = 8
    expand: int = 2
    conv_kernel: int = 4
    layer_norm_epsilon: float = 1e-5


def lm_config(settings: Settings) -> LMConfig:
    inner = settings.num_heads * settings.head_dim
    if inner != settings.expand * settings.hidden_size:
        sizes = f"num_heads={settings.num_heads} times head_dim={settings.head_dim}"
        raise settings.refuse("expand", f"{sizes} over hidden_size={settings.hidden_size}")
    options = {**settings.options_of("mamba2"), "d_inner": inner}
    return parts.lm_config(settings, ["mamba2/none"] * settings.num_hidden_layers, {"mamba2": options})


def step_size_limits(settings: Any) -> dict[str, Any]:
    """What the step sizes are kept between by the field ``time_step_limit``, if by anything.

    Raises:
        ValueError: these are no limits.
    """
    limits = [0.0, inf] if settings.time_step_limit is None else settings.time_step_limit
    if len(limits) != 2 or not 0 <= limits[0] <= limits[1] or not limits[1]:
        raise settings.refuse("time_step_limit", "the least step size and the largest")
    low, high = map(float, limits)
    return {"dt_limit_min": low, "dt_limit_max": None if high == inf else high}


def mixer(normed: bool = True) -> list[Rule]:
    """Rules of the mixer; ``normed`` where its output has a norm."""
    names = ("in_proj.weight", "A_log", "D", "dt_bias", *(["norm.weight"] if normed else []), "out_proj.weight")
    return [*(rule(name, name) for name in names), *short_convolution("conv1d", "conv", bias=True)]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    layer = [norm("norm.weight"), *under("mixer.", "mixers.0.", mixer())]
    last = norm("backbone.norm_f.weight")
    return model(config, [layer] * config.depth, "backbone.embeddings.weight", last, "backbone.layers")
