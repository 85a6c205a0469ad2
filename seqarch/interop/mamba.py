"""Mamba: ``MambaForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from seqarch.interop import parts
from seqarch.interop.parts import model, norm, short_convolution
from seqarch.interop.settings import BaseSettings
from seqarch.interop.weights import Rule, WeightMap, rule, under
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Fields of ``MambaConfig``."""

    model_type = "mamba"
    only: ClassVar = {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True}
    options: ClassVar = {
        "model": {"norm_eps": "layer_norm_epsilon"},
        "mamba": {"d_state": "state_size", "conv_width": "conv_kernel", "d_inner": "intermediate_size"},
    }

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
    return model_of(settings, {})


def model_of(settings: Settings, selection: dict[str, Any]) -> LMConfig:
    """Our configuration, with these options of the mixer besides."""
    options = {
        **settings.options_of("mamba"),
        "d_inner": settings.intermediate_size or settings.expand * settings.hidden_size,
        "dt_rank": dt_rank(settings, "time_step_rank"),
        **selection,
    }
    layers = ["mamba/none"] * settings.num_hidden_layers
    return parts.lm_config(settings, layers, {"mamba": options})


def dt_rank(settings: BaseSettings, name: str) -> int:
    """The rank of the step size's projection that the field says."""
    rank = getattr(settings, name)
    if rank == "auto":
        return ceil(settings.hidden_size / 16)
    if isinstance(rank, str):
        raise settings.refuse(name, "an int or 'auto'")
    return rank


def mixer() -> list[Rule]:
    """Rules of the mixer."""
    names = {"x_proj.weight": "select.weight", "dt_proj.weight": "dt.weight", "dt_proj.bias": "dt.bias"}
    same = ("in_proj.weight", "A_log", "D", "out_proj.weight")
    return [
        *(rule(theirs, ours) for theirs, ours in ({name: name for name in same} | names).items()),
        *short_convolution("conv1d", "conv", bias=True),
    ]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    layer = [norm("norm.weight"), *under("mixer.", "mixers.0.", mixer())]
    last = norm("backbone.norm_f.weight")
    return model(config, [layer] * config.depth, "backbone.embeddings.weight", last, "backbone.layers")
