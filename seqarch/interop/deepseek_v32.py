"""DeepSeek-V3.2: ``DeepseekV32ForCausalLM``, DeepSeek-V3 with an indexer that picks what latent attention reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from seqarch.interop import deepseek_v3, latent
from seqarch.interop.weights import Rule, WeightMap, reorder, rule, under
from seqarch.models import LMConfig

CHANNELS = {"dense": "swiglu", "sparse": "moe"}


@dataclass(frozen=True, kw_only=True)
class Settings(deepseek_v3.Settings):
    """Fields of ``DeepseekV32Config``."""

    model_type = "deepseek_v32"
    mixer = "sparse_mla"
    aliases: ClassVar = {**deepseek_v3.Settings.aliases, "num_experts": "n_routed_experts"}
    in_files_only: ClassVar = (*deepseek_v3.Settings.in_files_only, "num_experts")
    unread: ClassVar = (*latent.LatentSettings.unread, "rope_interleave")
    options: ClassVar = {
        "sparse_mla": {
            **latent.LatentSettings.options["mla"],
            "top_k": "index_topk",
            "index_heads": "index_n_heads",
            "index_width": "index_head_dim",
        }
    }
    layer_kinds: ClassVar = {"mlp_layer_types": CHANNELS}

    max_position_embeddings: int = 163840
    q_lora_rank: int = 1536
    mlp_layer_types: list[str] | None = None
    index_topk: int = 2048
    index_head_dim: int = 128
    index_n_heads: int = 64

    def latent(self) -> dict[str, Any]:
        """Options of a ``sparse_mla``, whose indexer does not learn, as theirs."""
        if self.index_topk == 1:
            raise self.refuse("index_topk", "at least 2: an indexer of one token learns nothing")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise self.refuse("index_head_dim", f"at least qk_rope_head_dim ({self.qk_rope_head_dim}), which turn")
        return {**super().latent(), "index_loss_weight": 0.0}

    def channels(self) -> list[str]:
        if self.mlp_layer_types is None:
            return super().channels()
        return self.chosen("mlp_layer_types", CHANNELS, self.mlp_layer_types, self.num_hidden_layers)


def lm_config(settings: Settings) -> LMConfig:
    return deepseek_v3.lm_config(settings)


def attention(options: Mapping[str, Any], pairs: bool = False) -> list[Rule]:
    """Latent attention and its ``indexer``, as a ``sparse_mla``.

    Args:
        pairs: whether neighbouring channels turn together in their indexer, as they do in their attention.
    """
    names = {
        "wq_b.weight": "index_query.weight",
        "wk.weight": "index_key.weight",
        "k_norm.weight": "index_norm.weight",
        "k_norm.bias": "index_norm.bias",
    }
    turning, width = options["qk_rope_head_dim"], options["index_width"]
    head = [*range(0, turning, 2), *range(1, turning, 2), *range(turning, width)]
    heads = {"wq_b.weight": options["index_heads"]}
    own = [rule("weights_proj.weight", "index_weight.weight")]
    for theirs, ours in names.items():
        order = [h * width + i for h in range(heads.get(theirs, 1)) for i in head]
        own.append(rule(theirs, ours, *([reorder(order)] if pairs else [])))
    return [*latent.attention(options, pairs=True), *under("indexer.", "", own)]


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    return latent.weights(config, attention(config.mixers["sparse_mla"]))
