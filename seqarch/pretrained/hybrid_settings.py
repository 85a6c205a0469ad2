"""What ``config.json`` says of a model made here, for state-space, convolution and hybrid families."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from seqarch.models import LanguageModel
from seqarch.pretrained.decoder_settings import head_settings
from seqarch.pretrained.kinds_of_layers import Layers


def _places(layers: Layers, name: str) -> list[int]:
    """The layers that have this mixer or channel mixer."""
    return [i for i, (mixers, channel) in enumerate(layers.kinds) if name in (*mixers, channel)]


def _inner(config: Any, name: str) -> dict[str, Any]:
    """The inner width of a state space, by how many times that of the stream it is, under this name."""
    times = config.inner_width / config.d_model
    if times != int(times):
        raise ValueError(f"the inner width over d_model is {times}, expected a whole number")
    return {name: int(times)}


def _limits(ssm: Any) -> list[float]:
    return [ssm.dt_limit_min, math.inf if ssm.dt_limit_max is None else ssm.dt_limit_max]


def _falcon_mamba(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    ssm = layers.get("mamba")
    return {
        **_inner(ssm, "expand"),
        "state_size": ssm.d_state,
        "conv_kernel": ssm.conv_width,
        "time_step_rank": "auto" if ssm.dt_rank is None else ssm.dt_rank,
        "mixer_rms_eps": ssm.norm_eps,
        "layer_norm_epsilon": model.config.norm_eps,
    }


def _bamba(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    ssm, mixer, dense = layers.get("mamba2"), layers.get("attention"), layers.get("swiglu")
    return {
        **head_settings(mixer),
        **_inner(ssm, "mamba_expand"),
        "attention_bias": mixer.output_bias,
        "attn_layer_indices": _places(layers, "attention"),
        "mamba_n_heads": ssm.inner_width // ssm.head_dim,
        "mamba_d_head": ssm.head_dim,
        "mamba_n_groups": ssm.n_groups,
        "mamba_d_state": ssm.d_state,
        "mamba_d_conv": ssm.conv_width,
        "time_step_limit": _limits(ssm),
        "intermediate_size": dense.hidden_width,
        "mlp_bias": dense.bias,
        "rms_norm_eps": model.config.norm_eps,
    }


def _lfm2(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    convolution, mixer = layers.get("gated_short_conv"), layers.get("attention")
    full = _places(layers, "attention")
    return {
        **head_settings(mixer),
        "layer_types": ["full_attention" if i in full else "conv" for i in range(model.config.depth)],
        "conv_L_cache": convolution.conv_width,
        "conv_bias": convolution.bias,
        "block_auto_adjust_ff_dim": False,
        "intermediate_size": layers.get("swiglu").hidden_width,
        "norm_eps": model.config.norm_eps,
    }


def _minimax(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    moe, kept, added = layers.get("moe"), model.config.residual_factors, model.config.output_factors
    windowed = "sliding_window" in layers.configs
    mixer = layers.get("sliding_window" if windowed else "attention")
    linear = _places(layers, "lightning_attention")
    names = {"full_attn": "sliding_window" if windowed else "attention", "linear_attn": "lightning_attention"}
    factors = {
        f"{name}_{each}_factor": given.get(own, 1.0)
        for name, own in {**names, "mlp": "moe"}.items()
        for each, given in (("alpha", kept), ("beta", added))
    }
    return {
        **head_settings(mixer),
        "layer_types": ["linear_attention" if i in linear else "full_attention" for i in range(model.config.depth)],
        "sliding_window": mixer.window,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "intermediate_size": moe.hidden_width,
        **factors,
        "rms_norm_eps": model.config.norm_eps,
    }


def _xlstm(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    cell = layers.get("mlstm")
    return {
        "num_heads": cell.num_heads,
        "qk_dim_factor": cell.num_heads * cell.keys / cell.d_model,
        "v_dim_factor": cell.num_heads * cell.values / cell.d_model,
        "gate_soft_cap": cell.gate_cap,
        "eps": cell.denominator_eps,
        "ffn_proj_factor": layers.get("swiglu").hidden_width / cell.d_model,
        "ffn_round_up_to_multiple_of": 1,
        "output_logit_soft_cap": model.config.logit_cap,
        "norm_eps": model.config.norm_eps,
    }


HYBRIDS: dict[str, Callable[[Layers, LanguageModel], dict[str, Any]]] = {
    "bamba": _bamba,
    "falcon_mamba": _falcon_mamba,
    "lfm2": _lfm2,
    "minimax": _minimax,
    "xlstm": _xlstm,
}
"""By family."""
