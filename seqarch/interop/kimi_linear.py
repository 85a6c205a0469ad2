"""Kimi Linear: ``KimiLinearForCausalLM``, Kimi delta attention and latent attention with a mixture of experts."""

from __future__ import annotations

from typing import Any

from seqarch.interop import parts
from seqarch.interop.parts import experts, gated_mlp, model, norm, short_convolution
from seqarch.interop.settings import Settings
from seqarch.interop.weights import Rule, WeightMap, concatenate, reshape, rule, under
from seqarch.models import LMConfig

MIXERS = {"linear_attention": "kda", "full_attention": "mla"}
CHANNELS = {"dense": "swiglu", "sparse": "moe"}


def lm_config(settings: Settings) -> LMConfig:
    settings.only(hidden_act="silu", attention_bias=False, num_expert_group=1, topk_group=1)
    heads = settings.get("num_attention_heads")
    settings.only(num_key_value_heads=heads)
    first = _first_release(settings)
    delta = {
        "num_heads": settings.get("linear_num_heads", default=first.get("num_heads", default=32)),
        "key_width": settings.get("linear_head_dim", default=first.get("head_dim", default=128)),
        "conv_width": settings.get("linear_conv_kernel_dim", default=first.get("short_conv_kernel_size", default=4)),
        "norm_eps": settings.get("rms_norm_eps"),
    }
    moe = {
        "num_experts": settings.get("num_experts", "num_local_experts"),
        "top_k": settings.get("num_experts_per_token", "num_experts_per_tok"),
        "hidden": settings.get("moe_intermediate_size"),
        "router": "sigmoid",
        "normalise_weights": settings.get("moe_renormalize", "norm_topk_prob"),
        "weight_scale": settings.get("routed_scaling_factor"),
        "expert_bias": True,
        "shared_experts": settings.get("num_shared_experts", "n_shared_experts"),
    }
    layers = [f"{mixer}/{channel}" for mixer, channel in _layers(settings)]
    return parts.lm_config(
        settings,
        layers,
        {"kda": delta, "mla": _latent_options(settings)},
        {"moe": moe, "swiglu": {"hidden": settings.get("intermediate_size")}},
    )


def _layers(settings: Settings) -> list[tuple[str, str]]:
    """The mixer and the channel mixer of each layer, from today's names or those of the first release."""
    depth, dense = settings.get("num_hidden_layers"), settings.get("first_k_dense_replace", default=1)
    full = _first_release(settings).get("full_attn_layers", default=())  # counted from 1
    kinds = ["full_attention" if i + 1 in full else "linear_attention" for i in range(depth)]
    channels = ["dense" if i < dense else "sparse" for i in range(depth)]
    mixers = settings.chosen("layer_types", MIXERS, kinds, depth)
    return list(zip(mixers, settings.chosen("mlp_layer_types", CHANNELS, channels, depth), strict=True))


def _first_release(settings: Settings) -> Settings:
    return Settings({"model_type": settings.model_type, **settings.get("linear_attn_config", default={})})


def _latent_options(settings: Settings) -> dict[str, Any]:
    return {
        "num_heads": settings.get("num_attention_heads"),
        "qk_nope_head_dim": settings.get("qk_nope_head_dim"),
        "v_head_dim": settings.get("v_head_dim"),
        "qk_rope_head_dim": settings.get("qk_rope_head_dim"),
        "kv_lora_rank": settings.get("kv_lora_rank"),
        "q_lora_rank": settings.get("q_lora_rank", default=None),
        "position": "none",
        "norm_eps": 1e-6,  # whatever rms_norm_eps
    }


def _delta(options: dict[str, Any]) -> list[Rule]:
    heads, width = options["num_heads"], options["key_width"]
    inner = heads * width
    return [
        rule([f"{part}_proj.weight" for part in "qkv"], "qkv_proj.linear.weight", concatenate(inner, inner, inner)),
        *short_convolution("conv1d", "qkv_proj.conv", bias=False),
        rule("forget_gate.f_a_proj.weight", "decay.0.weight"),
        rule("forget_gate.f_b_proj.weight", "decay.1.weight"),
        rule("forget_gate.A_log", "A_log", reshape((1, 1, heads, 1), (heads,))),
        rule("forget_gate.dt_bias", "dt_bias"),
        rule("b_proj.weight", "beta_proj.weight"),
        rule("g_a_proj.weight", "gate.0.weight"),
        rule("g_b_proj.weight", "gate.1.weight"),
        norm("o_norm.weight"),
        rule("o_proj.weight", "out_proj.weight"),
    ]


def _latent(options: dict[str, Any]) -> list[Rule]:
    queries = {"q_a_proj.weight": "query.0.weight", "q_a_layernorm.weight": "query.1.weight"}
    queries["q_b_proj.weight"] = "query.2.weight"
    names = {
        **({"q_proj.weight": "query.weight"} if options["q_lora_rank"] is None else queries),
        "kv_a_proj_with_mqa.weight": "compress.weight",
        "kv_a_layernorm.weight": "norm.weight",
        "kv_b_proj.weight": "expand.weight",
        "o_proj.weight": "out_proj.weight",
    }
    return [rule(theirs, ours) for theirs, ours in names.items()]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    mixers = {"kda": _delta, "mla": _latent}
    tables = {name: under("self_attn.", "mixers.0.", make(config.mixers[name])) for name, make in mixers.items()}
    moe = config.channels["moe"]
    channels = {
        "moe": [
            *experts(moe["hidden"]),
            rule("mlp.gate.e_score_correction_bias", "channel.router.expert_bias"),
            *gated_mlp(moe["hidden"] * moe["shared_experts"], "mlp.shared_experts.", "channel.shared."),
        ],
        "swiglu": gated_mlp(config.channels["swiglu"]["hidden"]),
    }
    norms = [norm("input_layernorm.weight"), norm("post_attention_layernorm.weight", "channel_norm.weight")]
    layers = [[*norms, *tables[mixer], *channels[channel]] for mixer, channel in _layers(settings)]
    return model(config, layers, "model.embed_tokens.weight", norm("model.norm.weight"))
