"""What ``config.json`` says of a model made here, for state-space, convolution and hybrid families."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from seqarch.interop import nemotron_h, rwkv7, zamba2
from seqarch.models import LanguageModel, tile_pattern
from seqarch.pretrained.decoder_settings import THEIR_ACTIVATIONS, head_settings, multipliers
from seqarch.pretrained.kinds_of_layers import Layers

NO_HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
"""Of an attention that no layer has: theirs says something of it all the same."""


def _any_heads(layers: Layers) -> dict[str, Any]:
    """Heads and rotary positions of the attention, if a layer has one."""
    return head_settings(layers.get("attention")) if "attention" in layers.configs else NO_HEADS


def _inner(config: Any, name: str) -> dict[str, Any]:
    """The inner width of a state space, by how many times that of the stream it is, under this name."""
    times = config.inner_width / config.d_model
    if times != int(times):
        raise ValueError(f"the inner width over d_model is {times}, expected a whole number")
    return {name: int(times)}


def _mamba(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    ssm = layers.get("mamba")
    expand = math.ceil(ssm.inner_width / ssm.d_model)  # of no effect beside the width itself
    return {"expand": expand, "time_step_rank": "auto" if ssm.dt_rank is None else ssm.dt_rank}


def _mamba2(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    ssm = layers.get("mamba2")
    return {**_inner(ssm, "expand"), "num_heads": ssm.inner_width // ssm.head_dim, "rms_norm": True}


def _bamba(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    ssm, dense = layers.get("mamba2"), layers.get("swiglu")
    return {
        **_any_heads(layers),
        **_inner(ssm, "mamba_expand"),
        "attention_bias": _has_biases(layers),
        "attn_layer_indices": layers.places("attention"),
        **_heads(ssm),
        "intermediate_size": dense.hidden_width,
        "mlp_bias": dense.bias,
    }


def _has_biases(layers: Layers) -> bool:
    return getattr(layers.configs.get("attention"), "output_bias", False)


def _heads(ssm: Any) -> dict[str, Any]:
    """Of a Mamba-2."""
    limits = [ssm.dt_limit_min, math.inf if ssm.dt_limit_max is None else ssm.dt_limit_max]
    heads = {"mamba_n_heads": ssm.inner_width // ssm.head_dim, "mamba_d_head": ssm.head_dim}
    return {**heads, "time_step_limit": limits}


def _granitemoehybrid(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    """Layers have a shared MLP, and experts beside it if any."""
    ssm = layers.get("mamba2")
    own: dict[str, Any] = {}
    if "swiglu" in layers.configs:
        own = {"num_local_experts": 0, "shared_intermediate_size": layers.get("swiglu").hidden_width}
    turns = getattr(layers.configs.get("attention"), "position", "none") == "rotary"
    return {
        **_any_heads(layers),
        **_inner(ssm, "mamba_expand"),
        **_heads(ssm),
        **multipliers(layers, model),
        "attention_bias": _has_biases(layers),
        "position_embedding_type": "rope" if turns else None,
        **own,
    }


def _every(layers: Layers, name: str) -> tuple[int, int]:
    """The period and the offset of the layers that have this mixer or channel mixer."""
    places, depth = layers.places(name), len(layers.kinds)
    for period in range(1, depth + 2):
        for offset in range(period):
            if [i for i in range(depth) if i % period == offset] == places:
                return period, offset
    raise ValueError(f"its layers of {name} are {places} (from 0), expected one in each period of equal length")


def _jamba(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    ssm = layers.get("mamba")
    full, routed = _every(layers, "attention"), _every(layers, "moe")
    return {
        **_inner(ssm, "mamba_expand"),
        "mamba_dt_rank": "auto" if ssm.dt_rank is None else ssm.dt_rank,
        "attn_layer_period": full[0],
        "attn_layer_offset": full[1],
        "expert_layer_period": routed[0],
        "expert_layer_offset": routed[1],
        **({} if "moe" in layers.configs else {"num_experts": 1}),
    }


def _nemotron_h(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    """One of their blocks for each mixer and for each channel mixer."""
    ssm = layers.get("mamba2")
    names = {ours: theirs for theirs, ours in reversed((nemotron_h.MIXERS | nemotron_h.CHANNELS).items())}
    blocks = [each for mixers, channel in layers.kinds for each in (*mixers, channel) if each != "none"]
    return {
        "num_hidden_layers": len(blocks),
        "layers_block_type": [names.get(block, block) for block in blocks],
        "mamba_num_heads": ssm.inner_width // ssm.head_dim,
    }


def _olmo_hybrid(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    delta, mixer, dense = layers.get("gated_delta_net"), layers.get("attention"), layers.get("swiglu")
    still = {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
    return {
        **head_settings(mixer),
        **(still if mixer.position == "none" else {}),
        "attention_bias": mixer.output_bias,
        "linear_value_head_dim": delta.values,
        "intermediate_size": dense.hidden_width,
    }


def _lfm2(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    layers.get("gated_short_conv")
    return {**_any_heads(layers), "block_auto_adjust_ff_dim": False}


def _lfm2_moe(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    layers.get("gated_short_conv")
    return {**_any_heads(layers), "num_dense_layers": len(layers.places("swiglu"))}


def _minimax(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    moe, kept, added = layers.get("moe"), model.config.residual_factors, model.config.output_factors
    windowed = "sliding_window" in layers.configs
    mixer = layers.get("sliding_window" if windowed else "attention")
    linear = layers.places("lightning_attention")
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


def _rwkv7(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    """Their layers are two of ours, and what is between them and the head has a bias or not in all norms alike."""
    time, channel, config = layers.get("rwkv7"), layers.get("rwkv_channel_mix"), model.config
    names = {ours: theirs for theirs, ours in reversed([*rwkv7.ACTIVATIONS.items()])}
    return {
        "num_hidden_layers": -(-config.depth // 2),
        "num_heads": time.heads,
        "norm_first": config.embedding_norm != "none",
        "fuse_norm": time.removal_eps == rwkv7.REMOVAL_EPS[True],
        "norm_bias": config.norm == rwkv7.NORMS[True],
        "hidden_act": names.get(channel.activation, "sqrelu"),
    }


def _xlstm(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    cell = layers.get("mlstm")
    return {
        "qk_dim_factor": cell.num_heads * cell.keys / cell.d_model,
        "v_dim_factor": cell.num_heads * cell.values / cell.d_model,
        "ffn_proj_factor": layers.get("swiglu").hidden_width / cell.d_model,
        "ffn_round_up_to_multiple_of": 1,
    }


def _zamba2(layers: Layers, model: LanguageModel) -> dict[str, Any]:
    """What its hybrid layers share is said by their pattern: how many blocks take turns, and their adapters."""
    ssm, block = layers.get("mamba2"), layers.configs.get(zamba2.HYBRID)
    found = {**_any_heads(layers), **_inner(ssm, "mamba_expand"), "n_mamba_heads": ssm.inner_width // ssm.head_dim}
    if block is None:
        return found
    heads = layers.get("attention")
    expected = (heads.head_width / 2) ** -0.5
    if heads.scale is None or not math.isclose(heads.scale, expected):
        raise ValueError(f"the scale of its attention is {heads.scale}, expected {expected}, for heads half as wide")
    kinds = tile_pattern(model.config.pattern, model.config.depth)
    own = [kinds[i].sharing[0] for i in layers.places(zamba2.HYBRID)]
    if not all("adapter_rank" in each for each in own):
        raise ValueError("its hybrid layers have no adapters, expected (share=..., adapter_rank=..., adapted=[...])")
    return {
        **found,
        "intermediate_size": 4 * block.d_model if block.hidden is None else block.hidden,
        "hidden_act": THEIR_ACTIVATIONS.get(block.activation, "silu"),
        "num_mem_blocks": len({each["share"] for each in own}),
        "adapter_rank": own[0]["adapter_rank"],
        "use_shared_attention_adapter": "attention.qkv_proj" in own[0].get("adapted", ["attention.qkv_proj"]),
        "use_mem_rope": heads.position == "rotary",
    }


HYBRIDS: dict[str, Callable[[Layers, LanguageModel], dict[str, Any]]] = {
    "bamba": _bamba,
    "falcon_mamba": _mamba,
    "granitemoehybrid": _granitemoehybrid,
    "jamba": _jamba,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2_moe,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "minimax": _minimax,
    "nemotron_h": _nemotron_h,
    "olmo_hybrid": _olmo_hybrid,
    "rwkv7": _rwkv7,
    "xlstm": _xlstm,
    "zamba2": _zamba2,
}
"""By family."""
