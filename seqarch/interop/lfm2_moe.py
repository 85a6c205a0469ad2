"""LFM2 with experts: ``Lfm2MoeForCausalLM``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import lfm2, parts
from seqarch.interop.weights import WeightMap, rule
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(lfm2.ConvolutionSettings):
    """Fields of ``Lfm2MoeConfig``."""

    model_type = "lfm2_moe"
    may_be_zero = ("num_dense_layers",)
    options: ClassVar = {
        "moe": {
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "hidden": "moe_intermediate_size",
            "normalise_weights": "norm_topk_prob",
            "weight_scale": "routed_scaling_factor",
            "expert_bias": "use_expert_bias",
        }
    }

    hidden_size: int = 2048
    intermediate_size: int = 7168
    num_dense_layers: int = 2
    moe_intermediate_size: int = 1792
    num_experts: int = 32
    num_experts_per_tok: int = 4
    use_expert_bias: bool = True
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0


def lm_config(settings: Settings) -> LMConfig:
    depth, dense = settings.num_hidden_layers, settings.num_dense_layers
    parts.check_top_k(settings, "num_experts_per_tok", settings.norm_topk_prob and dense < depth)
    mixers = settings.chosen("layer_types", lfm2.MIXERS, settings.layer_types or [], depth)
    moe = {**settings.options_of("moe"), "router": "sigmoid"}
    return parts.lm_config(
        settings,
        [f"{mixer}/{'swiglu' if i < dense else 'moe'}" for i, mixer in enumerate(mixers)],
        settings.mixers(),
        {"moe": moe, "swiglu": settings.options_of("swiglu")},
    )


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    experts = parts.experts(settings.moe_intermediate_size, "feed_forward.")
    if settings.use_expert_bias:
        experts.append(rule("feed_forward.expert_bias", "channel.router.expert_bias"))
    rules = {**lfm2.tables(config, settings.conv_bias), "moe": experts}
    return parts.decoder(config, rules, lfm2.NORMS, last_norm="model.embedding_norm")
