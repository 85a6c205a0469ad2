"""Qwen3-Next: ``Qwen3NextForCausalLM``, Gated DeltaNet and gated attention with a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from seqarch.interop import parts
from seqarch.interop.parts import experts, gated_mlp, norm, short_convolution
from seqarch.interop.settings import PartialRotarySettings
from seqarch.interop.weights import Rule, WeightMap, concatenate, reorder, rule, split, under
from seqarch.models import LMConfig

MIXERS = {"linear_attention": "gated_delta_net", "full_attention": "attention"}
MOST_ROWS = 1 << 22
"""Of a projection whose rows are put in another order: far more than any model's, and few enough to list."""


@dataclass(frozen=True, kw_only=True)
class MixerSettings(PartialRotarySettings):
    """Fields of the attention and of the linear attention, which Qwen3.5 has too."""

    only: ClassVar = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
    in_files_only = (*PartialRotarySettings.in_files_only, "full_attention_interval")
    options: ClassVar = {
        "model": {"norm_eps": "rms_norm_eps"},
        "attention": {
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
        },
        "gated_delta_net": {
            "num_heads": "linear_num_value_heads",
            "num_key_heads": "linear_num_key_heads",
            "key_width": "linear_key_head_dim",
            "conv_width": "linear_conv_kernel_dim",
            "norm_eps": "rms_norm_eps",
        },
        "swiglu": {"hidden": "intermediate_size"},
    }
    layer_kinds: ClassVar = {"layer_types": MIXERS}

    layer_types: list[str] | None = None
    full_attention_interval: int = 4
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256
    partial_rotary_factor: float | None = 0.25
    max_position_embeddings: int = 32768
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Settings(MixerSettings):
    """Fields of ``Qwen3NextConfig``."""

    model_type = "qwen3_next"
    may_be_zero = ("shared_expert_intermediate_size",)
    options: ClassVar = {
        "moe": {
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "moe_intermediate_size",
            "normalise_weights": "norm_topk_prob",
        }
    }

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 48
    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: int = 1
    intermediate_size: int = 5632
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts: int = 512
    num_experts_per_tok: int = 10
    norm_topk_prob: bool = True


def lm_config(settings: Settings) -> LMConfig:
    parts.check_top_k(settings, "num_experts_per_tok", settings.norm_topk_prob and "moe" in _channels(settings))
    layers = [f"{mixer}/{channel}" for mixer, channel in zip(mixers(settings), _channels(settings), strict=True)]
    return parts.lm_config(
        settings,
        layers,
        mixer_options(settings),
        {"moe": _moe(settings), "swiglu": settings.options_of("swiglu")},
        zero_centred_norms=True,
    )


def mixer_options(settings: MixerSettings) -> dict[str, dict[str, Any]]:
    """Options of the attention and of the linear attention."""
    attention = {
        **settings.options_of("attention"),
        "qk_norm": True,
        "norm_eps": settings.rms_norm_eps,
        "zero_centred_norms": True,
        "output_gate": True,
        **settings.rotary(settings.head_dim),
    }
    delta = {
        **settings.options_of("gated_delta_net"),
        "expand_v": settings.linear_value_head_dim / settings.linear_key_head_dim,
    }
    return {"attention": attention, "gated_delta_net": delta}


def mixers(settings: MixerSettings) -> list[str]:
    depth, every = settings.num_hidden_layers, settings.full_attention_interval
    default = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(depth)]
    entries = default if settings.layer_types is None else settings.layer_types
    return settings.chosen("layer_types", MIXERS, entries, depth)


def _channels(settings: Settings) -> list[str]:
    dense, step = settings.mlp_only_layers or [], settings.decoder_sparse_step
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(settings.num_hidden_layers)]
    return ["moe" if each else "swiglu" for each in sparse]


def _moe(settings: Settings) -> dict[str, Any]:
    hidden, shared = settings.moe_intermediate_size, settings.shared_expert_intermediate_size
    if shared % hidden:
        raise ValueError(
            f"qwen3_next: shared_expert_intermediate_size={shared} has no counterpart here (only multiples of"
            f" moe_intermediate_size={hidden})"
        )
    return {
        **settings.options_of("moe"),
        "shared_experts": shared // hidden,
        "shared_gate": True,
    }


def _by_part(groups: int, sizes: list[int]) -> list[int]:
    """Rows that come group by group, each with parts of these sizes, in the order of the parts."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    whole = sum(sizes)
    _check_rows(groups * whole, f"{groups} heads of {whole} channels each")
    return [
        group * whole + start + row
        for start, size in zip(starts, sizes, strict=True)
        for group in range(groups)
        for row in range(size)
    ]


def _check_rows(count: int, of_what: str) -> None:
    """Before their order is listed, which may be out of reach where ``config.json`` is wrong."""
    if count > MOST_ROWS:
        raise ValueError(f"qwen3_next: {of_what} make {count} channels, expected at most {MOST_ROWS}")


def attention_rules(options: dict[str, Any]) -> list[Rule]:
    heads, width = options["num_heads"], options["head_dim"]
    inner, shared = heads * width, options["num_kv_heads"] * width
    _check_rows(2 * shared, f"num_key_value_heads={options['num_kv_heads']} keys and values of {width} channels each")
    query, gate = _by_part(heads, [width, width])[:inner], _by_part(heads, [width, width])[inner:]
    order = [*query, *range(2 * inner, 2 * inner + 2 * shared), *gate]
    return [
        rule(
            [f"{part}_proj.weight" for part in "qkv"],
            ("qkv_proj.linear.weight", "gate.weight"),
            *(concatenate(2 * inner, shared, shared), reorder(order), split(inner + 2 * shared, inner)),
        ),
        norm("q_norm.weight", "query_norm.weight"),
        norm("k_norm.weight", "key_norm.weight"),
        rule("o_proj.weight", "out_proj.weight"),
    ]


def _delta(options: dict[str, Any]) -> list[Rule]:
    groups, heads, keys = options["num_key_heads"], options["num_heads"], options["key_width"]
    shared = heads // groups
    values = int(shared * options["expand_v"] * keys)
    qkvz, ba = _by_part(groups, [keys, keys, values, values]), _by_part(groups, [shared, shared])
    return [
        rule(
            "in_proj_qkvz.weight",
            ("qkv_proj.linear.weight", "gate.weight"),
            *(reorder(qkvz), split(groups * (2 * keys + values), groups * values)),
        ),
        rule("in_proj_ba.weight", "ab_proj.weight", reorder([*ba[heads:], *ba[:heads]])),
        *short_convolution("conv1d", "qkv_proj.conv", bias=False),
        *(rule(name, name) for name in ("A_log", "dt_bias", "norm.weight")),
        rule("out_proj.weight", "out_proj.weight"),
    ]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    moe = config.channels["moe"]
    shared = gated_mlp(moe["hidden"] * moe["shared_experts"], "mlp.shared_expert.", "channel.shared.")
    channels = {
        "moe": [*experts(moe["hidden"]), *shared, rule("mlp.shared_expert_gate.weight", "channel.shared_gate.weight")],
        "swiglu": gated_mlp(config.channels["swiglu"]["hidden"]),
    }
    tables = {
        "attention": under("self_attn.", "mixers.0.", attention_rules(config.mixers["attention"])),
        "gated_delta_net": under("linear_attn.", "mixers.0.", _delta(config.mixers["gated_delta_net"])),
        **channels,
    }
    return parts.decoder(config, tables)
