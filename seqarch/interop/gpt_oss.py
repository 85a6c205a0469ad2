"""GPT-OSS: ``GptOssForCausalLM``, windows and all tokens in turn, with sinks, and experts of bounded gated units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from seqarch.interop import decoder, parts
from seqarch.interop.weights import Rule, WeightMap, reorder, rule, split, under
from seqarch.models import LMConfig

YARN = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "original_max_position_embeddings": 4096,
}
"""The rotary positions of a file that says nothing of them."""


@dataclass(frozen=True, kw_only=True)
class Settings(decoder.DecoderSettings, decoder.BiasSettings, decoder.LayerTypeSettings):
    """Fields of ``GptOssConfig``."""

    model_type = "gpt_oss"
    only: ClassVar = {"attention_dropout": 0.0, "swiglu_alpha": 1.702}
    aliases: ClassVar = {"num_experts": "num_local_experts"}
    unread = ("hidden_act",)
    options: ClassVar = {
        "moe": {
            "num_experts": "num_local_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "intermediate_size",
            "limit": "swiglu_limit",
        }
    }

    vocab_size: int = 201088
    hidden_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    head_dim: int | None = 64
    intermediate_size: int = 2880
    rms_norm_eps: float = 1e-5
    rope_theta: float | None = 150000.0
    max_position_embeddings: int = 131072
    attention_bias: bool = True
    sliding_window: int | None = 128
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_limit: float = 7.0

    def rotary(self, width: int) -> dict[str, Any]:
        if self.rope_scaling or self.rope_parameters is not None:
            return super().rotary(width)
        return self.rotation(width, "rope_parameters", YARN, self.rope_theta)


def lm_config(settings: Settings) -> LMConfig:
    parts.check_top_k(settings, "num_experts_per_tok", normalised=True)
    depth = settings.num_hidden_layers
    moe = {
        **settings.options_of("moe"),
        "bias": True,
        "router_bias": True,
        "activation": "quick_gelu",
        "value_offset": 1.0,
    }
    return decoder.lm_config(
        settings,
        settings.attention(sinks=True, **settings.biases()),
        {"moe": moe},
        kinds=settings.kinds([decoder.FULL if i % 2 else decoder.SLIDING for i in range(depth)]),
        window=settings.sliding_window,
    )


def _experts(hidden: int) -> list[Rule]:
    """Gates and values are neighbours in theirs."""
    apart = [*range(0, 2 * hidden, 2), *range(1, 2 * hidden, 2)]
    steps = {dim: (reorder(apart, dim), split(hidden, hidden, dim=dim)) for dim in (1, 2)}
    return [
        *(rule(f"mlp.router.{each}", f"channel.router.{each}") for each in ("weight", "bias")),
        rule("mlp.experts.gate_up_proj", ("channel.w_gate", "channel.w_in"), *steps[2]),
        rule("mlp.experts.gate_up_proj_bias", ("channel.b_gate", "channel.b_in"), *steps[1]),
        rule("mlp.experts.down_proj", "channel.w_out"),
        rule("mlp.experts.down_proj_bias", "channel.b_out"),
    ]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    tables = {
        name: under("self_attn.", "mixers.0.", [*parts.attention(options), rule("sinks", "sinks")])
        for name, options in config.mixers.items()
    }
    return parts.decoder(config, {**tables, "moe": _experts(settings.intermediate_size)})
