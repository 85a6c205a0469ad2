"""DeepSeek-V3: ``DeepseekV3ForCausalLM``, latent attention and experts in groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqarch.interop import latent, parts
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig


@dataclass(frozen=True, kw_only=True)
class Settings(latent.LatentSettings):
    """Fields of ``DeepseekV3Config``."""

    model_type = "deepseek_v3"
    aliases: ClassVar = {"num_local_experts": "n_routed_experts"}
    options: ClassVar = {
        "moe": {"normalise_weights": "norm_topk_prob", "num_groups": "n_group", "top_groups": "topk_group"}
    }

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    intermediate_size: int = 18432
    max_position_embeddings: int = 4096
    first_k_dense_replace: int = 3
    n_routed_experts: int = 256
    moe_intermediate_size: int = 2048
    routed_scaling_factor: float = 2.5
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    rope_interleave: bool = True


def lm_config(settings: Settings) -> LMConfig:
    moe = {}
    if "moe" in settings.channels():
        parts.check_top_k(settings, "num_experts_per_tok", settings.norm_topk_prob)
        moe = settings.experts(
            router="sigmoid",
            expert_bias=True,
            **settings.groups(settings.n_group, settings.topk_group),
        )
    return latent.lm_config(settings, moe)


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    return latent.weights(config, latent.attention(config.mixers["mla"], settings.rope_interleave))
