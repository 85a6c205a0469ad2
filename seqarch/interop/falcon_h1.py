"""Falcon-H1: ``FalconH1ForCausalLM``, attention and Mamba-2 side by side.

Its maximal-update multipliers are folded into the weights that they multiply, but for that of the embedding, which may
be tied to the head.
"""

from __future__ import annotations

from math import inf
from typing import Any

from seqarch.interop import mamba2, parts
from seqarch.interop.parts import head_sizes, model, norm
from seqarch.interop.settings import Settings
from seqarch.interop.weights import Rule, WeightMap, concatenate, constant, rule, scale, split, under
from seqarch.models import LMConfig


def lm_config(settings: Settings) -> LMConfig:
    settings.only(hidden_act="silu", time_step_limit=(0.0, inf), mamba_conv_bias=True)
    settings.only(attention_bias=False, mlp_bias=False, projectors_bias=False, mamba_proj_bias=False)
    width, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    inner = settings.get("mamba_d_ssm", default=settings.get("mamba_expand") * width)
    gated = "gate_last" if settings.get("mamba_norm_before_gate", default=True) else "gate_first"
    attention = {
        "num_heads": heads,
        "num_kv_heads": settings.get("num_key_value_heads", default=heads),
        "head_dim": settings.get("head_dim", default=width // heads),
        **settings.rotary(),
    }
    ssm = {
        "d_state": settings.get("mamba_d_state"),
        "head_dim": inner // settings.get("mamba_n_heads"),
        "d_inner": inner,
        "n_groups": settings.get("mamba_n_groups"),
        "conv_width": settings.get("mamba_d_conv"),
        "output_norm": gated if settings.get("mamba_rms_norm", default=False) else "none",
        "norm_eps": settings.get("rms_norm_eps"),
    }
    return parts.lm_config(
        settings,
        ["attention+mamba2/swiglu"] * settings.get("num_hidden_layers"),
        {"attention": attention, "mamba2": ssm},
        {"swiglu": {"hidden": settings.get("intermediate_size")}},
        embedding_scale=settings.get("embedding_multiplier", default=1.0),
    )


def _attention(settings: Settings, options: dict[str, Any]) -> list[Rule]:
    outer, key = (settings.get(f"{name}_multiplier", default=1.0) for name in ("attention_in", "key"))
    return [
        rule(
            [f"{part}_proj.weight" for part in "qkv"],
            "qkv_proj.linear.weight",
            *(scale(outer, outer * key, outer), concatenate(*head_sizes(options))),
        ),
        rule("o_proj.weight", "out_proj.weight", scale(settings.get("attention_out_multiplier", default=1.0))),
    ]


def _ssm(settings: Settings, options: dict[str, Any]) -> list[Rule]:
    shared = options["n_groups"] * options["d_state"]
    sizes = (options["d_inner"], options["d_inner"], shared, shared, options["d_inner"] // options["head_dim"])
    outer = settings.get("ssm_in_multiplier", default=1.0)
    factors = [outer * factor for factor in settings.factors("ssm_multipliers", 5)]
    return [
        rule("in_proj.weight", "in_proj.weight", split(*sizes), scale(*factors), concatenate(*sizes)),
        *mamba2.mixer(normed=options["output_norm"] != "none"),
        rule("out_proj.weight", "out_proj.weight", scale(settings.get("ssm_out_multiplier", default=1.0))),
    ]


def _mlp(settings: Settings, hidden: int) -> list[Rule]:
    gate, down = settings.factors("mlp_multipliers", 2)
    return [
        rule(
            ("gate_proj.weight", "up_proj.weight"),
            "in_proj.weight",
            *(scale(gate, 1.0), concatenate(hidden, hidden)),
        ),
        rule("down_proj.weight", "out_proj.weight", scale(down)),
    ]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    layer = [
        norm("input_layernorm.weight"),
        constant("branch_weights", 1.0, (2, config.d_model)),
        *under("self_attn.", "mixers.0.", _attention(settings, config.mixers["attention"])),
        *under("mamba.", "mixers.1.", _ssm(settings, config.mixers["mamba2"])),
        norm("pre_ff_layernorm.weight", "channel_norm.weight"),
        *under("feed_forward.", "channel.", _mlp(settings, config.channels["swiglu"]["hidden"])),
    ]
    head = scale(settings.get("lm_head_multiplier", default=1.0))  # the head may be tied; the norm before it is not
    last = rule("model.final_layernorm.weight", "norm.weight", head)
    return model(config, [layer] * config.depth, "model.embed_tokens.weight", last)
