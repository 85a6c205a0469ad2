"""What llama.cpp's file of a model holds, by family: metadata, and their tensors as it reads them.

Facts are those of llama.cpp's ``convert_hf_to_gguf.py`` and of ``gguf.constants`` 0.19. Tensors come in float32 by
their names in files of ``transformers``, experts stacked, and may be on the meta device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.pretrained.gguf_hybrids import HYBRIDS, change_delta, delta_hybrid, shared_and_routed
from seqarch.pretrained.gguf_model import (
    Architecture,
    Metadata,
    Model,
    Named,
    attention,
    change_mamba,
    change_mamba2,
    frequency_divisors,
    halves_to_neighbours,
    heads_of_mamba2,
    state_space,
)
from seqarch.pretrained.gguf_rwkv7 import RWKV7


def _mamba(model: Model) -> Metadata:
    options = model.mixer("mamba")
    _check_double(model, options["d_inner"])
    base = state_space(model, options, model.settings.layer_norm_epsilon)
    return {**base, "ssm.time_step_rank": options["dt_rank"], "ssm.dt_b_c_rms": False}


def _check_double(model: Model, inner: int) -> None:
    if inner != 2 * model.settings.hidden_size:
        raise model.refuse("hidden_size", f"half of the inner width, which is {inner}")


def _mamba2(model: Model) -> Metadata:
    options = model.mixer("mamba2")
    _check_double(model, options["d_inner"])
    return {**state_space(model, options, model.settings.layer_norm_epsilon), **heads_of_mamba2(options)}


def _falcon_h1(model: Model) -> Metadata:
    settings, options = model.settings, model.mixer("mamba2")
    if options["output_norm"] == "gate_last":
        raise model.refuse("mamba_norm_before_gate", "false, where mamba_rms_norm is true")
    if settings.mlp_multipliers is None or settings.ssm_multipliers is None:
        missing = "mlp_multipliers" if settings.mlp_multipliers is None else "ssm_multipliers"
        raise model.refuse(missing, "a list of numbers")
    return {
        **state_space(model, options, settings.rms_norm_eps),
        **heads_of_mamba2(options),
        **attention(model, model.mixer("attention")),
        "vocab_size": settings.vocab_size,
        "feed_forward_length": settings.intermediate_size,
    }


def _change_falcon_h1(model: Model, name: str, tensor: Tensor) -> list[Named]:
    """The multipliers become part of the weights: llama.cpp has none of them."""
    settings = model.settings
    ((name, tensor),) = change_mamba2(model, name, tensor)
    gate, down = settings.mlp_multipliers
    read, rows = settings.attention_in_multiplier, model.mixer("mamba2")
    factors = {
        "down_proj": (down,),
        "gate_proj": (gate,),
        "k_proj": (settings.key_multiplier, read),
        "q_proj": (read,),
        "v_proj": (read,),
        "o_proj": (settings.attention_out_multiplier,),
        "out_proj": (settings.ssm_out_multiplier,),
        "in_proj": (settings.ssm_in_multiplier,),
        "lm_head": (settings.lm_head_multiplier,),
        "embed_tokens": (settings.embedding_multiplier,),
    }
    part = name.removesuffix(".weight").rpartition(".")[2]
    for factor in factors.get(part, ()):
        tensor = tensor * factor
    if part == "in_proj":
        groups = rows["n_groups"] * rows["d_state"]
        sizes = [rows["d_inner"], rows["d_inner"], groups, groups, rows["d_inner"] // rows["head_dim"]]
        split = zip(tensor.split(sizes), settings.ssm_multipliers, strict=True)
        tensor = torch.cat([each * factor for each, factor in split])
    return [(name, tensor)]


def _qwen3_next(model: Model) -> Metadata:
    settings = model.settings
    if settings.mlp_only_layers or settings.decoder_sparse_step != 1:
        name = "mlp_only_layers" if settings.mlp_only_layers else "decoder_sparse_step"
        raise model.refuse(name, "experts in every layer")
    if not settings.norm_topk_prob:
        raise model.refuse("norm_topk_prob", "true")
    return {**delta_hybrid(model), "feed_forward_length": settings.intermediate_size, **shared_and_routed(model)}


def _change_qwen3_next(model: Model, name: str, tensor: Tensor) -> list[Named]:
    """q, k, v and z of all heads come one after the other."""
    if not name.endswith("in_proj_qkvz.weight"):
        return change_delta(model, name, tensor)
    settings = model.settings
    groups = settings.linear_num_key_heads
    values = settings.linear_num_value_heads // groups * settings.linear_value_head_dim
    by_head = tensor.view(groups, -1, tensor.shape[1])
    sizes = [settings.linear_key_head_dim, settings.linear_key_head_dim, values, values]
    q, k, v, z = (part.flatten(0, 1) for part in by_head.split(sizes, dim=1))
    layer = name.removesuffix("in_proj_qkvz.weight")
    return [(f"{layer}in_proj_qkv.weight", torch.cat([q, k, v])), (f"{layer}in_proj_z.weight", z)]


def _mixtral(model: Model) -> Metadata:
    settings = model.settings
    if settings.sliding_window is not None:
        raise model.refuse("sliding_window", "None")
    return {
        **_llama(model),
        "expert_count": settings.num_local_experts,
        "expert_used_count": settings.num_experts_per_tok,
    }


def _llama(model: Model) -> Metadata:
    settings, options = model.settings, model.mixer("attention")
    if settings.hidden_act not in ("silu", "swish"):
        raise model.refuse("hidden_act", "silu")
    return {
        **attention(model, options),
        "vocab_size": settings.vocab_size,
        "embedding_length": settings.hidden_size,
        "block_count": settings.num_hidden_layers,
        "feed_forward_length": settings.intermediate_size,
        "attention.layer_norm_rms_epsilon": float(settings.rms_norm_eps),
        "rope.dimension_count": options["head_dim"],
    }


def _change_llama(model: Model, name: str, tensor: Tensor) -> list[Named]:
    return halves_to_neighbours(model.mixer("attention"), name, tensor)


ARCHITECTURES = {
    "falcon_h1": Architecture("falcon-h1", _falcon_h1, _change_falcon_h1),
    **HYBRIDS,
    "llama": Architecture("llama", _llama, _change_llama, further=frequency_divisors),
    "mamba": Architecture("mamba", _mamba, change_mamba),
    "mamba2": Architecture("mamba2", _mamba2, change_mamba2),
    "mixtral": Architecture("llama", _mixtral, _change_llama, further=frequency_divisors),
    "qwen3_next": Architecture("qwen3next", _qwen3_next, _change_qwen3_next),
    "rwkv7": RWKV7,
}
"""By family of :data:`seqarch.interop.FAMILIES`."""
