"""Kimi Linear: ``KimiLinearForCausalLM``, Kimi delta attention and latent attention with a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from seqarch.interop import parts
from seqarch.interop.parts import experts, gated_mlp, model, norm, short_convolution
from seqarch.interop.settings import BaseSettings
from seqarch.interop.weights import Rule, WeightMap, concatenate, reshape, rule, under
from seqarch.models import LMConfig
from seqarch.ops.dispatch.checks import fits

MIXERS = {"linear_attention": "kda", "full_attention": "mla"}
CHANNELS = {"dense": "swiglu", "sparse": "moe"}


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Fields of ``KimiLinearConfig``; ``linear_attn_config`` is the first release's, and wins."""

    model_type = "kimi_linear"
    only: ClassVar = {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "n_group": 1,
        "topk_group": 1,
    }
    aliases: ClassVar = {
        "moe_renormalize": "norm_topk_prob",
        "num_expert_group": "n_group",
        "num_experts": "num_local_experts",
        "num_experts_per_token": "num_experts_per_tok",
        "num_shared_experts": "n_shared_experts",
    }
    in_files_only = ("linear_attn_config", "first_k_dense_replace")
    options: ClassVar = {
        "model": {"norm_eps": "rms_norm_eps"},
        "kda": {
            "num_heads": "linear_num_heads",
            "key_width": "linear_head_dim",
            "conv_width": "linear_conv_kernel_dim",
            "norm_eps": "rms_norm_eps",
        },
        "mla": {
            "num_heads": "num_attention_heads",
            "qk_nope_head_dim": "qk_nope_head_dim",
            "v_head_dim": "v_head_dim",
            "qk_rope_head_dim": "qk_rope_head_dim",
            "kv_lora_rank": "kv_lora_rank",
            "q_lora_rank": "q_lora_rank",
        },
        "moe": {
            "num_experts": "num_local_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "moe_intermediate_size",
            "normalise_weights": "norm_topk_prob",
            "weight_scale": "routed_scaling_factor",
            "shared_experts": "n_shared_experts",
        },
        "swiglu": {"hidden": "intermediate_size"},
    }
    layer_kinds: ClassVar = {"layer_types": MIXERS, "mlp_layer_types": CHANNELS}
    may_be_zero = ("first_k_dense_replace",)

    vocab_size: int = 163840
    hidden_size: int = 2304
    num_hidden_layers: int = 27
    layer_types: list[str] | None = None
    mlp_layer_types: list[str] | None = None
    first_k_dense_replace: int = 1
    linear_attn_config: dict[str, Any] = field(default_factory=dict)
    linear_num_heads: int = 32
    linear_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    num_attention_heads: int = 32
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    intermediate_size: int = 9216
    moe_intermediate_size: int = 1024
    num_local_experts: int = 256
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.446
    n_shared_experts: int = 1
    rms_norm_eps: float = 1e-5

    def linear(self, name: str, default: int) -> int:
        """A size of the linear attention, by its name in the first release and its value elsewhere."""
        value = self.linear_attn_config.get(name, default)
        if not fits(value, (int,)) or value < 1:
            raise self.refuse("linear_attn_config", f"{name} to be a positive int")
        return value


def lm_config(settings: Settings) -> LMConfig:
    routed = "moe" in [channel for _, channel in _layers(settings)]
    parts.check_top_k(settings, "num_experts_per_tok", settings.norm_topk_prob and routed)
    delta = {
        **settings.options_of("kda"),
        "num_heads": settings.linear("num_heads", settings.linear_num_heads),
        "key_width": settings.linear("head_dim", settings.linear_head_dim),
        "conv_width": settings.linear("short_conv_kernel_size", settings.linear_conv_kernel_dim),
    }
    latent = {
        **settings.options_of("mla"),
        "position": "none",
        "norm_eps": 1e-6,  # whatever rms_norm_eps
    }
    moe = {
        **settings.options_of("moe"),
        "router": "sigmoid",
        "expert_bias": True,
    }
    return parts.lm_config(
        settings,
        [f"{mixer}/{channel}" for mixer, channel in _layers(settings)],
        {"kda": delta, "mla": latent},
        {"moe": moe, "swiglu": settings.options_of("swiglu")},
        tie_embeddings=False,  # theirs ties them for no configuration
    )


def _layers(settings: Settings) -> list[tuple[str, str]]:
    """The mixer and the channel mixer of each layer."""
    depth, first = settings.num_hidden_layers, settings.first_k_dense_replace
    kinds = settings.layer_types or _first_release(settings)
    if kinds is None:
        kinds = ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(depth)]
    channels = settings.mlp_layer_types
    if channels is None:
        channels = ["dense" if i < first else "sparse" for i in range(depth)]
    mixers = settings.chosen("layer_types", MIXERS, kinds, depth)
    return list(zip(mixers, settings.chosen("mlp_layer_types", CHANNELS, channels, depth), strict=True))


def _first_release(settings: Settings) -> list[str] | None:
    """The kinds of the layers from the first release's lists, which count from 1; ``None`` without them."""
    lists = [settings.linear_attn_config.get(name) for name in ("full_attn_layers", "kda_layers")]
    full, linear = lists
    if full is None or linear is None:
        return None
    whole = all(isinstance(each, list) and all(fits(i, (int,)) for i in each) for each in lists)
    if not whole or sorted([*full, *linear]) != list(range(1, settings.num_hidden_layers + 1)):
        raise settings.refuse("linear_attn_config", "each layer once in full_attn_layers or kda_layers")
    return ["full_attention" if i + 1 in full else "linear_attention" for i in range(settings.num_hidden_layers)]


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
