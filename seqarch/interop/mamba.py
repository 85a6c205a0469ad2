"""Mamba: ``MambaForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from seqarch.interop import parts
from seqarch.interop.parts import model, norm, short_convolution
from seqarch.interop.settings import BaseSettings
from seqarch.interop.weights import WeightMap, rule, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Fields of ``MambaConfig``."""

    model_type = "mamba"
    only: ClassVar = {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True}

    vocab_size: int = 50280
    hidden_size: int = 768
    num_hidden_layers: int = 32
    state_size: int = 16
    expand: int = 2
    intermediate_size: int | None = None
    conv_kernel: int = 4
    time_step_rank: int | str = "auto"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True


def lm_config(settings: Settings) -> LMConfig:
    rank = settings.time_step_rank
    if isinstance(rank, str) and rank != "auto":
        raise settings.refuse("time_step_rank", "an int or 'auto'")
    options = {
        "d_state": settings.state_size,
        "d_inner": settings.intermediate_size or settings.expand * settings.hidden_size,
        "conv_width": settings.conv_kernel,
        "dt_rank": ceil(settings.hidden_size / 16) if isinstance(rank, str) else rank,
    }
    layers = ["mamba/none"] * settings.num_hidden_layers
    return parts.lm_config(settings, layers, {"mamba": options}, norm_eps=settings.layer_norm_epsilon)


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
