"""What llama.cpp's file of a model holds, by family: metadata, and their tensors as it reads them.

Facts are those of llama.cpp's ``convert_hf_to_gguf.py`` and of ``gguf.constants`` 0.19. Tensors come in float32 by
their names in files of ``transformers``, experts stacked, and may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqarch.models import LMConfig

Metadata = dict[str, int | float | bool]
Named = tuple[str, Tensor]

UNBOUNDED = 2**20
"""The context length of models that have no limit, as llama.cpp's own converter writes it."""


@dataclass(frozen=True)
class Model:
    """What is to be written.

    Attributes:
        settings: typed, of the family.
        config: the whole of their ``config.json``.
        ours: our configuration of the same model.
    """

    settings: Any
    config: Mapping[str, Any]
    ours: LMConfig

    def mixer(self, name: str) -> Mapping[str, Any]:
        return self.ours.mixers[name]

    def refuse(self, name: str, expected: str) -> ValueError:
        """The error for a setting that llama.cpp has no model of."""
        value = getattr(self.settings, name)
        return ValueError(f"llama.cpp has no {self.settings.model_type} with {name}={value!r}, but only {expected}")


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp's.

    Attributes:
        name: its own.
        metadata: by key, without the architecture's name before it.
        change: from a tensor of theirs to those that the file holds, by names that ``gguf``'s table knows.
    """

    name: str
    metadata: Callable[[Model], Metadata]
    change: Callable[[Model, str, Tensor], list[Named]]


def _state_space(model: Model, options: Mapping[str, Any], eps: float) -> Metadata:
    """The keys that all models with a state space have."""
    return {
        "context_length": UNBOUNDED,
        "embedding_length": model.settings.hidden_size,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": model.settings.num_hidden_layers,
        "ssm.conv_kernel": options["conv_width"],
        "ssm.inner_size": options["d_inner"],
        "ssm.state_size": options["d_state"],
        "attention.layer_norm_rms_epsilon": float(eps),
    }


def _mamba(model: Model) -> Metadata:
    options = model.mixer("mamba")
    _check_double(model, options["d_inner"])
    base = _state_space(model, options, model.settings.layer_norm_epsilon)
    return {**base, "ssm.time_step_rank": options["dt_rank"], "ssm.dt_b_c_rms": False}


def _check_double(model: Model, inner: int) -> None:
    if inner != 2 * model.settings.hidden_size:
        raise model.refuse("hidden_size", f"half of the inner width, which is {inner}")


def _change_mamba(model: Model, name: str, tensor: Tensor) -> list[Named]:
    if name.endswith(".A_log"):
        tensor = -torch.exp(tensor)
    return [(name, tensor.squeeze(1) if name.endswith("conv1d.weight") else tensor)]


def _mamba2(model: Model) -> Metadata:
    options = model.mixer("mamba2")
    _check_double(model, options["d_inner"])
    return {**_state_space(model, options, model.settings.layer_norm_epsilon), **_heads_of_mamba2(options)}


def _heads_of_mamba2(options: Mapping[str, Any]) -> Metadata:
    return {
        "ssm.time_step_rank": options["d_inner"] // options["head_dim"],
        "ssm.group_count": options["n_groups"],
    }


def _change_mamba2(model: Model, name: str, tensor: Tensor) -> list[Named]:
    """A and D are columns, the norm a row for each group."""
    ((name, tensor),) = _change_mamba(model, name, tensor)
    if name.endswith((".A_log", ".D")):
        tensor = tensor.unsqueeze(-1)
    if name.endswith((".mixer.norm.weight", ".mamba.norm.weight")):
        tensor = tensor.view(model.mixer("mamba2")["n_groups"], -1)
    return [(_with_step_bias(name), tensor)]


def _with_step_bias(name: str) -> str:
    return name.removesuffix("dt_bias") + "dt_proj.bias" if name.endswith(".dt_bias") else name


def _falcon_h1(model: Model) -> Metadata:
    settings, options = model.settings, model.mixer("mamba2")
    if options["output_norm"] == "gate_last":
        raise model.refuse("mamba_norm_before_gate", "false, where mamba_rms_norm is true")
    if settings.mlp_multipliers is None or settings.ssm_multipliers is None:
        missing = "mlp_multipliers" if settings.mlp_multipliers is None else "ssm_multipliers"
        raise model.refuse(missing, "a list of numbers")
    return {
        **_state_space(model, options, settings.rms_norm_eps),
        **_heads_of_mamba2(options),
        **_attention(model, model.mixer("attention")),
        "vocab_size": settings.vocab_size,
        "feed_forward_length": settings.intermediate_size,
    }


def _attention(model: Model, options: Mapping[str, Any]) -> Metadata:
    if "rope_scaling" in options:
        raise model.refuse("rope_parameters", "unscaled angles")
    return {
        "context_length": int(model.config.get("max_position_embeddings") or UNBOUNDED),
        "attention.head_count": options["num_heads"],
        "attention.head_count_kv": options["num_kv_heads"],
        "attention.key_length": options["head_dim"],
        "attention.value_length": options["head_dim"],
        "rope.freq_base": float(options["rotary_base"]),
    }


def _change_falcon_h1(model: Model, name: str, tensor: Tensor) -> list[Named]:
    """The multipliers become part of the weights: llama.cpp has none of them."""
    settings = model.settings
    ((name, tensor),) = _change_mamba2(model, name, tensor)
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
    settings, options = model.settings, model.mixer("attention")
    every = settings.full_attention_interval
    usual = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(settings.num_hidden_layers)]
    if settings.layer_types not in (None, usual):
        raise model.refuse("layer_types", f"full attention in each layer that full_attention_interval={every} divides")
    if settings.mlp_only_layers or settings.decoder_sparse_step != 1:
        name = "mlp_only_layers" if settings.mlp_only_layers else "decoder_sparse_step"
        raise model.refuse(name, "experts in every layer")
    if not settings.norm_topk_prob:
        raise model.refuse("norm_topk_prob", "true")
    return {
        **_attention(model, options),
        "embedding_length": settings.hidden_size,
        "block_count": settings.num_hidden_layers,
        "feed_forward_length": settings.intermediate_size,
        "attention.layer_norm_rms_epsilon": float(settings.rms_norm_eps),
        "rope.dimension_count": int(options["head_dim"] * options["rotary_fraction"]),
        "expert_count": settings.num_experts,
        "expert_used_count": settings.num_experts_per_tok,
        "expert_feed_forward_length": settings.moe_intermediate_size,
        "expert_shared_feed_forward_length": settings.shared_expert_intermediate_size,
        "ssm.conv_kernel": settings.linear_conv_kernel_dim,
        "ssm.state_size": settings.linear_key_head_dim,
        "ssm.group_count": settings.linear_num_key_heads,
        "ssm.time_step_rank": settings.linear_num_value_heads,
        "ssm.inner_size": settings.linear_num_value_heads * settings.linear_value_head_dim,
        "full_attention_interval": every,
    }


def _change_qwen3_next(model: Model, name: str, tensor: Tensor) -> list[Named]:
    """Norms hold their factor and not its difference from 1; q, k, v and z of all heads come one after the other."""
    settings = model.settings
    ((name, tensor),) = _change_mamba(model, name, tensor)
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        tensor = tensor + 1
    if not name.endswith("in_proj_qkvz.weight"):
        return [(_with_step_bias(name), tensor)]
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
    options = model.mixer("attention")
    return {
        **_attention(model, options),
        "vocab_size": settings.vocab_size,
        "embedding_length": settings.hidden_size,
        "block_count": settings.num_hidden_layers,
        "feed_forward_length": settings.intermediate_size,
        "attention.layer_norm_rms_epsilon": float(settings.rms_norm_eps),
        "rope.dimension_count": options["head_dim"],
        "expert_count": settings.num_local_experts,
        "expert_used_count": settings.num_experts_per_tok,
    }


def _change_mixtral(model: Model, name: str, tensor: Tensor) -> list[Named]:
    """Rows of q and k in the order of llama.cpp's rotation, of neighbours; theirs turns the halves of a head."""
    options = model.mixer("attention")
    heads = {"q_proj": options["num_heads"], "k_proj": options["num_kv_heads"]}.get(name.split(".")[-2])
    if heads is not None:
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return [(name, tensor)]


ARCHITECTURES = {
    "falcon_h1": Architecture("falcon-h1", _falcon_h1, _change_falcon_h1),
    "mamba": Architecture("mamba", _mamba, _change_mamba),
    "mamba2": Architecture("mamba2", _mamba2, _change_mamba2),
    "mixtral": Architecture("llama", _mixtral, _change_mixtral),
    "qwen3_next": Architecture("qwen3next", _qwen3_next, _change_qwen3_next),
}
"""By family of :data:`seqarch.interop.FAMILIES`."""
