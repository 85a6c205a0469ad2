"""DeepSeek sparse attention (DSA): a small indexer picks the tokens that each query attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqarch import ops
from seqarch.layers.attention.options import KVHeadsConfig
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadProjection
from seqarch.layers.modules.linear import Linear
from seqarch.layers.sparse_attention.indexed import IndexedAttention, IndexedConfig
from seqarch.layers.sparse_attention.row_attention import CacheShape
from seqarch.ops.attention import flops as attention_flops


@dataclass(frozen=True, kw_only=True)
class DSAConfig(IndexedConfig, KVHeadsConfig):
    """Options of :class:`DSA`."""

    may_be_zero = (*KVHeadsConfig.may_be_zero, *IndexedConfig.may_be_zero)

    def __post_init__(self):
        super().__post_init__()
        turning = self.rotary_widths[-1]
        if self.position == "rotary" and (turning % 2 or not turning):
            raise ValueError(f"rotary positions need an even number of channels, got {turning} of index_width")

    @property
    def rotary_widths(self) -> tuple[int, ...]:
        of_index = () if self.take_index is not None else (int(self.rotary_fraction * self.index_width),)
        return self.rotary_width, *of_index


class DSA(IndexedAttention):
    """Attention to the ``top_k`` tokens s of the largest ``I_ts = sum_h w_th relu(q^I_th . k^I_s)`` up to t.

    DeepSeek-AI 2025, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", section 2.1. The indexer has
    few narrow heads and one key per token; all heads attend to the same tokens, of equal scores the earlier. A token
    itself is chosen by its score as any other, not by force. Where no more than ``top_k`` tokens are there at all, the
    choice is all of them and is not computed.

    *How the indexer learns.* Its input is detached and its choice has no gradient, so the outputs teach it nothing.
    While training, :meth:`auxiliary_loss` is ``KL(p_t || softmax(I_t))`` over the chosen tokens, averaged over t, where
    p is the attention's own distribution, averaged over the heads; p is detached, so the loss teaches the indexer
    alone. This is the paper's sparse stage. Its dense warm-up is the same loss with ``top_k`` no smaller than the
    sequences and all other parameters frozen.

    Departures: the release builds on multi-head latent attention and reads the indexer's queries from its latent, as
    ``sparse_mla`` does; here they come from the input, and the attention has plain grouped heads. ``rotary_fraction``
    holds for index heads too (in the release half of them turns). Its 8-bit scores and their Hadamard transform are
    left out: the indexer runs in float32 whatever the rest runs in, since in bfloat16 it would choose otherwise. As
    there, index keys have a layer norm and scores are scaled by ``(heads width)^-1/2``. Projections have
    ``nn.Linear``'s initialisation.

    The indexer scores all ``T^2 / 2`` pairs, a chunk of queries at a time; attention reads ``T top_k``. In training the
    loss needs the attention's scores once more, of all pairs a chunk at a time, which beats gathering the chosen keys
    until T is some twenty times ``top_k``; :meth:`flops` does not count it.
    """

    Config = DSAConfig

    @from_options
    def __init__(self, config: DSAConfig):
        super().__init__(config)
        heads, width = config.heads, config.head_width
        self.qkv_proj = HeadProjection(config.d_model, [(heads, width), *[(config.kv_heads, width)] * 2])
        self.make_indexer(config.d_model)
        self.out_proj = Linear(heads * width, config.d_model, bias=False)

    def head_maps(self) -> list[HeadMap]:
        out = HeadMap("o", "out_proj", self.config.heads, self.config.head_width)
        return [*self.qkv_proj.head_maps("qkv_proj"), out]

    def project(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (q, k, v), _ = self.qkv_proj(x)
        q, k = self.rotate(q, k, at=at)
        return q, k, v, x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None, start: Tensor | None) -> Tensor:
        if chosen is None:
            return ops.attention(q, k, v, key_start=start)
        lists = chosen.unsqueeze(2).expand(-1, -1, k.shape[2], -1)
        return ops.block_sparse_attention(q, k, v, lists, 1, key_start=start)

    def scored(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float | None]:
        return q, k, None

    def caches(self, length: int) -> list[CacheShape]:
        config = self.config
        return [CacheShape(length, config.kv_heads, config.head_width, config.head_width), *self.index_caches(length)]

    def read_flops(self, queries: int, keys: int, batch_size: int) -> int:
        width = self.config.head_width  # as many tokens as in a window of top_k, though others
        return attention_flops(queries, keys, self.config.heads, width, width, True, self.config.top_k, batch_size)
