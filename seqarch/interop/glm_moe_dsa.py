"""GLM-5: ``GlmMoeDsaForCausalLM``, DeepSeek-V3.2 whose layers may attend to what an earlier layer's indexer chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from seqarch.interop import deepseek_v3, deepseek_v32, latent
from seqarch.interop.weights import WeightMap
from seqarch.models import LMConfig

LISTS = "index"
"""The name by which layers hand on what their indexer chose."""

FULL, SHARED = "full", "shared"
LETTERS = {"F": FULL, "S": SHARED}


@dataclass(frozen=True, kw_only=True)
class Settings(deepseek_v32.Settings):
    """Fields of ``GlmMoeDsaConfig``; of those that say which layers have an indexer, the first that is given counts:
    ``indexer_types``, ``index_topk_pattern`` (such names, or their letters in one word), and one layer in each
    ``index_topk_freq`` from the number ``index_skip_topk_offset`` on.
    """

    model_type = "glm_moe_dsa"
    may_be_zero: ClassVar = (*deepseek_v32.Settings.may_be_zero, "index_topk_freq", "index_skip_topk_offset")

    vocab_size: int = 154880
    hidden_size: int = 6144
    num_hidden_layers: int = 78
    num_attention_heads: int = 64
    intermediate_size: int = 12288
    max_position_embeddings: int = 202752
    rms_norm_eps: float = 1e-5
    q_lora_rank: int = 2048
    qk_nope_head_dim: int = 192
    v_head_dim: int = 256
    n_group: int = 1
    topk_group: int = 1
    index_n_heads: int = 32
    indexer_types: list[str] | None = None
    index_topk_pattern: str | list[str] | None = None
    index_topk_freq: int = 1
    index_skip_topk_offset: int = 2

    def indexers(self) -> list[str]:
        """Of each layer ``"full"``, or ``"shared"`` where it has no indexer."""
        depth, pattern = self.num_hidden_layers, self.index_topk_pattern
        names = {name: name for name in (FULL, SHARED)}
        if self.indexer_types is not None:
            found = self.chosen("indexer_types", names, self.indexer_types, depth)
        elif pattern is not None:
            choices = LETTERS if isinstance(pattern, str) else names
            found = self.chosen("index_topk_pattern", choices, list(pattern), depth)
        else:
            every, first = max(self.index_topk_freq, 1), self.index_skip_topk_offset - 1
            found = [FULL if max(i - first, 0) % every == 0 else SHARED for i in range(depth)]
        if found[0] == SHARED:
            name = "index_topk_pattern" if self.indexer_types is None else "indexer_types"
            raise self.refuse(name, "an indexer in the first layer, as none before it chose anything")
        return found

    def own_options(self) -> list[dict[str, Any]]:
        kinds = self.indexers()
        full = {"give_index": LISTS} if SHARED in kinds else {}
        return [{"take_index": LISTS} if kind == SHARED else full for kind in kinds]


def lm_config(settings: Settings) -> LMConfig:
    return deepseek_v3.lm_config(settings)


def weights(settings: Settings) -> WeightMap:
    config = lm_config(settings)
    options = config.mixers["sparse_mla"]
    full, shared = deepseek_v32.attention(options, pairs=True), latent.attention(options, pairs=True)
    return latent.weights(config, lambda own: shared if "take_index" in own else full)
