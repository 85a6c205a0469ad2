"""Nemotron-H and Nemotron 3: ``NemotronHForCausalLM``, of Mamba-2, attention, MLPs and experts one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from seqarch.interop import mamba2, parts
from seqarch.interop.parts import attention, norm
from seqarch.interop.settings import BaseSettings
from seqarch.interop.weights import Rule, WeightMap, rule, transpose, under
from seqarch.models import LMConfig
from seqarch.models.pattern import MOST

MIXERS = {"linear_attention": "mamba2", "mamba": "mamba2", "full_attention": "attention", "attention": "attention"}
CHANNELS = {"mlp": "mlp", "moe": "moe"}
LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
"""The kinds of blocks in ``hybrid_override_pattern``."""


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Fields of ``NemotronHConfig``; how many blocks there are follows from their kinds."""

    model_type = "nemotron_h"
    only: ClassVar = {
        "attention_dropout": 0.0,
        "mamba_hidden_act": "silu",
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "use_bias": False,
        "use_conv_bias": True,
    }
    aliases: ClassVar = {
        "layer_types": "layers_block_type",
        "num_local_experts": "n_routed_experts",
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
        "mamba_dt_min": "time_step_min",
        "mamba_conv_bias": "use_conv_bias",
    }
    options: ClassVar = {
        "model": {"norm_eps": "layer_norm_epsilon"},
        "attention": {
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
        },
        "mamba2": {
            "d_state": "ssm_state_size",
            "head_dim": "mamba_head_dim",
            "n_groups": "n_groups",
            "conv_width": "conv_kernel",
            "norm_eps": "layer_norm_epsilon",
            "dt_limit_min": "time_step_min",
        },
        "mlp": {"hidden": "intermediate_size"},
        "moe": {
            "num_experts": "n_routed_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "moe_intermediate_size",
            "normalise_weights": "norm_topk_prob",
            "weight_scale": "routed_scaling_factor",
            "shared_hidden": "moe_shared_expert_intermediate_size",
            "latent": "moe_latent_size",
            "num_groups": "n_group",
            "top_groups": "topk_group",
        },
    }
    in_files_only = (
        *("hybrid_override_pattern", "num_hidden_layers"),
        *("mamba_n_groups", "mamba_d_conv", "mamba_dt_min", "mamba_conv_bias"),
    )

    vocab_size: int = 131072
    hidden_size: int = 4096
    num_hidden_layers: int = 1
    layers_block_type: list[str] | None = None
    hybrid_override_pattern: str | None = None
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int = 128
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    time_step_min: float = 0.001
    intermediate_size: int = 21504
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    moe_latent_size: int | None = None
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    layer_norm_epsilon: float = 1e-5


def lm_config(settings: Settings) -> LMConfig:
    layers = [f"{mixer}/{channel or 'none'}" for mixer, channel in _layers(settings)]
    routed = any(layer.endswith("/moe") for layer in layers)
    parts.check_top_k(settings, "num_experts_per_tok", settings.norm_topk_prob and routed)
    heads = settings.num_attention_heads
    options = {
        **settings.options_of("attention"),
        "num_kv_heads": settings.num_key_value_heads or heads,
        "position": "none",
    }
    ssm = {**settings.options_of("mamba2"), "d_inner": settings.mamba_num_heads * settings.mamba_head_dim}
    return parts.lm_config(
        settings,
        layers,
        {"attention": options, "mamba2": ssm},
        {"mlp": {**settings.options_of("mlp"), "activation": "squared_relu"}, "moe": _moe(settings)},
        tie_embeddings=False,  # theirs ties them for no configuration
    )


def _moe(settings: Settings) -> dict[str, Any]:
    return {
        **settings.options_of("moe"),
        "gated": False,
        "activation": "squared_relu",
        "router": "sigmoid",
        "weight_scale": float(settings.routed_scaling_factor),
        "expert_bias": True,
        "shared_experts": 1,
        **({"top_groups": None} if settings.n_group == 1 else {}),
    }


def _kinds(settings: Settings) -> list[str]:
    """Our name for each of their blocks."""
    if settings.layers_block_type is not None:
        name, entries = "layers_block_type", settings.layers_block_type
    elif settings.hybrid_override_pattern is not None:
        name = "hybrid_override_pattern"
        entries = [LETTERS.get(letter, letter) for letter in settings.hybrid_override_pattern]
    else:
        name, entries = "layers_block_type", list(LETTERS.values())
    if len(entries) > MOST:
        raise settings.refuse(name, f"at most {MOST} blocks")
    kinds = settings.chosen(name, {**MIXERS, **CHANNELS}, entries)
    if any(kind in CHANNELS and last in (None, *CHANNELS) for last, kind in pairwise([None, *kinds])):
        raise settings.refuse(name, "each mlp or moe right after a block of another kind")
    return kinds


def _layers(settings: Settings) -> Iterator[tuple[str, str | None]]:
    """The mixer and the channel mixer of each of our layers: one block of theirs, or two."""
    kinds = _kinds(settings)
    for kind, after in zip(kinds, [*kinds[1:], None], strict=True):
        if kind not in CHANNELS:
            yield kind, after if after in CHANNELS else None


def _experts(settings: Settings) -> list[Rule]:
    names = {
        "gate.weight": "router.weight",
        "gate.e_score_correction_bias": "router.expert_bias",
        "shared_experts.up_proj.weight": "shared.in_proj.weight",
        "shared_experts.down_proj.weight": "shared.out_proj.weight",
    }
    if settings.moe_latent_size is not None:
        names |= {"fc1_latent_proj.weight": "latent_in.weight", "fc2_latent_proj.weight": "latent_out.weight"}
    return [
        *(rule(theirs, ours) for theirs, ours in names.items()),
        rule("experts.up_proj", "w_in", transpose(1, 2)),
        rule("experts.down_proj", "w_out", transpose(1, 2)),
    ]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    tables = {
        "attention": attention(config.mixers["attention"]),
        "mamba2": mamba2.mixer(),
        "mlp": [rule("up_proj.weight", "in_proj.weight"), rule("down_proj.weight", "out_proj.weight")],
        "moe": _experts(settings),
    }
    rules, layer = [], -1
    for block, kind in enumerate(_kinds(settings)):
        layer += kind not in CHANNELS
        first, module = ("channel_norm", "channel.") if kind in CHANNELS else ("norm", "mixers.0.")
        own = [norm("norm.weight", f"{first}.weight"), *under("mixer.", module, tables[kind])]
        rules += under(f"model.layers.{block}.", f"stack.layers.{layer}.", own)
    outside = {"model.embeddings.weight": "embedding.weight", "model.norm_f.weight": "norm.weight"}
    outside["lm_head.weight"] = "head.weight"
    return WeightMap([*(rule(theirs, ours) for theirs, ours in outside.items()), *rules])
