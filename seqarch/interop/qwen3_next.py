"""Qwen3-Next: ``Qwen3NextForCausalLM``, Gated DeltaNet and gated attention with a mixture of experts."""

from __future__ import annotations

from typing import Any

from seqarch.interop import parts
from seqarch.interop.parts import experts, gated_mlp, model, norm, short_convolution
from seqarch.interop.settings import Settings
from seqarch.interop.weights import Rule, WeightMap, concatenate, reorder, rule, split, under
from seqarch.models import LMConfig


def lm_config(settings: Settings) -> LMConfig:
    settings.only(hidden_act="silu", attention_bias=False)
    eps = settings.get("rms_norm_eps")
    attention = {
        "num_heads": settings.get("num_attention_heads"),
        "num_kv_heads": settings.get("num_key_value_heads"),
        "head_dim": settings.get("head_dim"),
        "qk_norm": True,
        "norm_eps": eps,
        "output_gate": True,
        **settings.rotary(fraction=0.25),
    }
    delta = {
        "num_heads": settings.get("linear_num_value_heads"),
        "num_key_heads": settings.get("linear_num_key_heads"),
        "key_width": settings.get("linear_key_head_dim"),
        "expand_v": settings.get("linear_value_head_dim") / settings.get("linear_key_head_dim"),
        "conv_width": settings.get("linear_conv_kernel_dim"),
        "norm_eps": eps,
    }
    layers = [f"{mixer}/{channel}" for mixer, channel in zip(_mixers(settings), _channels(settings), strict=True)]
    return parts.lm_config(
        settings,
        layers,
        {"attention": attention, "gated_delta_net": delta},
        {"moe": _moe(settings), "swiglu": {"hidden": settings.get("intermediate_size")}},
    )


def _mixers(settings: Settings) -> list[str]:
    depth, every = settings.get("num_hidden_layers"), settings.get("full_attention_interval", default=4)
    default = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(depth)]
    names = {"linear_attention": "gated_delta_net", "full_attention": "attention"}
    return settings.chosen("layer_types", names, default, depth)


def _channels(settings: Settings) -> list[str]:
    dense, step = settings.get("mlp_only_layers", default=[]), settings.get("decoder_sparse_step", default=1)
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(settings.get("num_hidden_layers"))]
    return ["moe" if each else "swiglu" for each in sparse]


def _moe(settings: Settings) -> dict[str, Any]:
    hidden, shared = settings.get("moe_intermediate_size"), settings.get("shared_expert_intermediate_size")
    if shared % hidden:
        raise ValueError(
            f"qwen3_next: shared_expert_intermediate_size={shared} has no counterpart here (only multiples of"
            f" moe_intermediate_size={hidden})"
        )
    return {
        "num_experts": settings.get("num_experts"),
        "top_k": settings.get("num_experts_per_tok"),
        "hidden": hidden,
        "normalise_weights": settings.get("norm_topk_prob", default=True),
        "shared_experts": shared // hidden,
        "shared_gate": True,
    }


def _by_part(groups: int, sizes: list[int]) -> list[int]:
    """Rows that come group by group, each with parts of these sizes, in the order of the parts."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    whole = sum(sizes)
    return [
        group * whole + start + row
        for start, size in zip(starts, sizes, strict=True)
        for group in range(groups)
        for row in range(size)
    ]


def _attention(options: dict[str, Any]) -> list[Rule]:
    heads, width = options["num_heads"], options["head_dim"]
    inner, shared = heads * width, options["num_kv_heads"] * width
    query, gate = _by_part(heads, [width, width])[:inner], _by_part(heads, [width, width])[inner:]
    order = [*query, *range(2 * inner, 2 * inner + 2 * shared), *gate]
    return [
        rule(
            [f"{part}_proj.weight" for part in "qkv"],
            ("qkv_proj.linear.weight", "gate.weight"),
            *(concatenate(2 * inner, shared, shared), reorder(order), split(inner + 2 * shared, inner)),
        ),
        norm("q_norm.weight", "query_norm.weight", zero_centred=True),
        norm("k_norm.weight", "key_norm.weight", zero_centred=True),
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
    mixers = {
        "attention": under("self_attn.", "mixers.0.", _attention(config.mixers["attention"])),
        "gated_delta_net": under("linear_attn.", "mixers.0.", _delta(config.mixers["gated_delta_net"])),
    }
    norms = [
        norm("input_layernorm.weight", zero_centred=True),
        norm("post_attention_layernorm.weight", "channel_norm.weight", zero_centred=True),
    ]
    layers = [
        [*norms, *mixers[mixer], *channels[channel]]
        for mixer, channel in zip(_mixers(settings), _channels(settings), strict=True)
    ]
    return model(config, layers, "model.embed_tokens.weight", norm("model.norm.weight", zero_centred=True))
