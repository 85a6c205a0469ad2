"""What llama.cpp's files of hybrids hold whose layers differ: see :mod:`seqarch.pretrained.gguf_architectures`."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from seqarch.pretrained.gguf_model import (
    UNBOUNDED,
    Architecture,
    Metadata,
    Model,
    Named,
    attention,
    change_mamba,
    change_mamba2,
    with_step_bias,
)


def _each(have: list[bool], value: int) -> list[int]:
    """A number for each layer that has something, and 0 for the others."""
    return [value if has else 0 for has in have]


def _jamba(model: Model) -> Metadata:
    settings, ssm, options = model.settings, model.mixer("mamba"), model.mixer("attention")
    return {
        "context_length": int(model.config.get("max_position_embeddings") or UNBOUNDED),
        "embedding_length": settings.hidden_size,
        "block_count": settings.num_hidden_layers,
        "feed_forward_length": settings.intermediate_size,
        "attention.head_count": options["num_heads"],
        "attention.head_count_kv": _each(model.has("attention"), options["num_kv_heads"]),
        "attention.key_length": options["head_dim"],
        "attention.value_length": options["head_dim"],
        "attention.layer_norm_rms_epsilon": float(settings.rms_norm_eps),
        "ssm.conv_kernel": ssm["conv_width"],
        "ssm.inner_size": ssm["d_inner"],
        "ssm.state_size": ssm["d_state"],
        "ssm.time_step_rank": ssm["dt_rank"],
        "expert_count": settings.num_experts,
        "expert_used_count": settings.num_experts_per_tok,
    }


def _nemotron_h(model: Model) -> Metadata:
    """Blocks are of one mixer, MLP or experts each; of the latter two the width is that of their own kind."""
    settings, ssm, options = model.settings, model.mixer("mamba2"), model.mixer("attention")
    kinds = _blocks(model)
    if model.routed and "mlp" in kinds:
        raise ValueError("llama.cpp has no nemotron_h with both mlp and moe blocks, but only with one of the two")
    channel, width = ("mlp", settings.intermediate_size)
    if model.routed:
        channel, width = "moe", settings.moe_intermediate_size
    return {
        "context_length": UNBOUNDED,
        "vocab_size": settings.vocab_size,
        "embedding_length": settings.hidden_size,
        "block_count": len(kinds),
        "feed_forward_length": _each([kind == channel for kind in kinds], width),
        "attention.head_count": options["num_heads"],
        "attention.head_count_kv": _each([kind == "attention" for kind in kinds], options["num_kv_heads"]),
        "attention.key_length": options["head_dim"],
        "attention.value_length": options["head_dim"],
        "attention.layer_norm_rms_epsilon": float(settings.layer_norm_epsilon),
        "rope.dimension_count": options["head_dim"],
        "rope.scaling.finetuned": False,
        "ssm.conv_kernel": ssm["conv_width"],
        "ssm.inner_size": ssm["d_inner"],
        "ssm.state_size": ssm["d_state"],
        "ssm.time_step_rank": ssm["d_inner"] // ssm["head_dim"],
        "ssm.group_count": ssm["n_groups"],
        **(_experts_of_nemotron(settings) if model.routed else {}),
    }


def _blocks(model: Model) -> list[str]:
    """The kind of each of their blocks, by our names."""
    layers = zip(*(model.has(name) for name in ("attention", "mamba2", "mlp", "moe")), strict=True)
    names = ("attention", "mamba2", "mlp", "moe")
    return [name for layer in layers for name, has in zip(names, layer, strict=True) if has]


def _experts_of_nemotron(settings: Any) -> Metadata:
    latent = {} if settings.moe_latent_size is None else {"moe_latent_size": settings.moe_latent_size}
    return {
        "expert_count": settings.n_routed_experts,
        "expert_used_count": settings.num_experts_per_tok,
        "expert_feed_forward_length": settings.moe_intermediate_size,
        "expert_shared_feed_forward_length": settings.moe_shared_expert_intermediate_size,
        "expert_shared_count": 1,
        "expert_weights_norm": settings.norm_topk_prob,
        "expert_weights_scale": float(settings.routed_scaling_factor),
        "expert_group_count": settings.n_group,
        "expert_group_used_count": settings.topk_group,
        **latent,
    }


def _change_nemotron_h(model: Model, name: str, tensor: Tensor) -> list[Named]:
    name = re.sub(r"backbone\.(layers\.\d+)\.mixer\.experts", r"model.\1.mlp.experts", name)
    ((name, tensor),) = change_mamba2(model, name, tensor)
    return [(name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor)]


def _lfm2(model: Model) -> Metadata:
    settings = model.settings
    if settings.conv_bias:
        raise model.refuse("conv_bias", "false")
    options = model.mixer("attention")
    return {
        **attention(model, options),
        "vocab_size": settings.vocab_size,
        "embedding_length": settings.hidden_size,
        "block_count": settings.num_hidden_layers,
        "feed_forward_length": model.ours.channels["swiglu"]["hidden"],
        "attention.head_count_kv": _each(model.has("attention"), options["num_kv_heads"]),
        "attention.layer_norm_rms_epsilon": float(settings.norm_eps),
        "shortconv.l_cache": settings.conv_L_cache,
    }


SIGMOID = 2
"""llama.cpp's number of a router whose weights are sigmoids."""


def _lfm2_moe(model: Model) -> Metadata:
    settings = model.settings
    for name, only in (("norm_topk_prob", True), ("use_expert_bias", True), ("routed_scaling_factor", 1.0)):
        if getattr(settings, name) != only:
            raise model.refuse(name, str(only).lower())
    return {
        **_lfm2(model),
        "expert_count": settings.num_experts,
        "expert_used_count": settings.num_experts_per_tok,
        "expert_feed_forward_length": settings.moe_intermediate_size,
        "leading_dense_block_count": settings.num_dense_layers,
        "expert_gating_func": SIGMOID,
    }


def _change_lfm2(model: Model, name: str, tensor: Tensor) -> list[Named]:
    name = re.sub(r"model\.(layers\.\d+\.feed_forward\.experts)", r"\1", name)
    if name.endswith(".expert_bias"):
        name += ".bias"
    return [(name, tensor.squeeze(1) if name.endswith("conv.conv.weight") else tensor)]


def delta_hybrid(model: Model) -> Metadata:
    """The keys of Gated DeltaNet with gated attention in each layer that a number divides."""
    settings, options = model.settings, model.mixer("attention")
    every = settings.full_attention_interval
    usual = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(settings.num_hidden_layers)]
    if settings.layer_types not in (None, usual):
        raise model.refuse("layer_types", f"full attention in each layer that full_attention_interval={every} divides")
    return {
        **attention(model, options),
        "embedding_length": settings.hidden_size,
        "block_count": settings.num_hidden_layers,
        "attention.layer_norm_rms_epsilon": float(settings.rms_norm_eps),
        "rope.dimension_count": int(options["head_dim"] * options["rotary_fraction"]),
        "ssm.conv_kernel": settings.linear_conv_kernel_dim,
        "ssm.state_size": settings.linear_key_head_dim,
        "ssm.group_count": settings.linear_num_key_heads,
        "ssm.time_step_rank": settings.linear_num_value_heads,
        "ssm.inner_size": settings.linear_num_value_heads * settings.linear_value_head_dim,
        "full_attention_interval": every,
    }


def shared_and_routed(model: Model) -> Metadata:
    """The keys of experts of which one, gated, is for every token."""
    settings = model.settings
    return {
        "expert_count": settings.num_experts,
        "expert_used_count": settings.num_experts_per_tok,
        "expert_feed_forward_length": settings.moe_intermediate_size,
        "expert_shared_feed_forward_length": settings.shared_expert_intermediate_size,
    }


def change_delta(model: Model, name: str, tensor: Tensor) -> list[Named]:
    """Norms hold their factor and not its difference from 1."""
    ((name, tensor),) = change_mamba(model, name, tensor)
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        tensor = tensor + 1
    return [(with_step_bias(name), tensor)]


def _qwen3_5(model: Model) -> Metadata:
    settings = model.settings
    found = (settings.rope_scaling or settings.rope_parameters or {}).get("mrope_section") or [11, 11, 10]
    sections = {"rope.dimension_sections": ([*found, 0, 0, 0, 0])[:4]}
    if model.routed:
        return {**delta_hybrid(model), **sections, **shared_and_routed(model)}
    return {**delta_hybrid(model), **sections, "feed_forward_length": settings.intermediate_size}


def _change_qwen3_5(model: Model, name: str, tensor: Tensor) -> list[Named]:
    """Heads of values that share one of keys are as far apart as llama.cpp repeats keys: in turn, not in groups."""
    settings = model.settings
    groups, values = settings.linear_num_key_heads, settings.linear_num_value_heads
    ((name, tensor),) = change_delta(model, name, tensor)
    part = name.partition("linear_attn.")[2]
    if not part or groups == values or part == "norm.weight":
        return [(name, tensor)]
    if part == "out_proj.weight":
        return [(name, _in_turn(tensor.t(), groups, values).t())]
    keys = 2 * groups * settings.linear_key_head_dim if part in ("in_proj_qkv.weight", "conv1d.weight") else 0
    return [(name, torch.cat([tensor[:keys], _in_turn(tensor[keys:], groups, values)]))]


def _in_turn(rows: Tensor, groups: int, heads: int) -> Tensor:
    """The rows of heads that come group by group, with the groups in turn."""
    return rows.unflatten(0, (groups, heads // groups, -1)).transpose(0, 1).flatten(0, 2)


HYBRIDS = {
    "jamba": Architecture("jamba", _jamba, change_mamba),
    "lfm2": Architecture("lfm2", _lfm2, _change_lfm2),
    "lfm2_moe": Architecture("lfm2moe", _lfm2_moe, _change_lfm2),
    "nemotron_h": Architecture("nemotron_h", _nemotron_h, _change_nemotron_h, with_experts="nemotron_h_moe"),
    "qwen3_5_moe_text": Architecture("qwen35moe", _qwen3_5, _change_qwen3_5),
    "qwen3_5_text": Architecture("qwen35", _qwen3_5, _change_qwen3_5),
}
"""By family."""
