"""DeepSeek sparse attention on latents, as DeepSeek-V3.2 has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.attention.mla import LatentMixer, MLAConfig
from seqarch.layers.mixer import first_tensor
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import widened
from seqarch.layers.modules.rotary import rotary_tables, rotate
from seqarch.layers.sparse_attention.indexed import IndexedAttention, IndexedConfig
from seqarch.layers.sparse_attention.row_attention import CacheShape
from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class SparseMLAConfig(IndexedConfig, MLAConfig):
    """Options of :class:`SparseMLA`."""

    may_be_zero = (*MLAConfig.may_be_zero, *IndexedConfig.may_be_zero)

    def __post_init__(self):
        super().__post_init__()
        if self.position == "rotary" and self.take_index is None and self.index_width < self.shared:
            raise ValueError(f"index_width ({self.index_width}) must hold the {self.shared} channels that turn")


class SparseMLA(LatentMixer, IndexedAttention):
    """Latent attention to the ``top_k`` tokens s of the largest ``I_ts = sum_h w_th relu(q^I_th . k^I_s)`` up to t.

    DeepSeek-AI 2025, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", section 2.1: the projections
    of :class:`MLA <seqarch.layers.attention.mla.MLA>` and the indexer of :class:`DSA
    <seqarch.layers.sparse_attention.dsa.DSA>`, which learns as there. Not DSA, whose attention has plain grouped heads.
    The indexer's queries come from the low-rank queries where there are such, else from the input; the first
    ``qk_rope_head_dim`` of its channels turn, in halves also in the release, where those of the attention turn in
    pairs. Index keys have a layer norm with ``norm_eps``. As in DSA the indexer runs in float32 or wider, and the
    low-rank queries that it reads too, without the release's 8-bit scores and their Hadamard transform; of equal scores
    the earlier token is chosen.

    Per token are kept the latent and the shared key, C + R numbers, and the indexer's key in float32. Chosen tokens are
    read in that of MLA's two forms that takes fewer FLOPs: absorbed, a query reads ``top_k`` latents; expanded, all
    latents of the cache become keys and values first.
    """

    Config = SparseMLAConfig
    config: SparseMLAConfig

    @from_options
    def __init__(self, config: SparseMLAConfig):
        super().__init__(config)
        self.make_indexer(config.q_lora_rank or config.d_model, config.norm_eps)

    def project(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.takes or not isinstance(self.query, nn.Sequential):  # the query's parts apart are for the indexer
            source, q = x, self.query(x)
        else:
            compress, norm, expand = self.query
            with without_autocast(x.device):  # the indexer chooses by it
                source = widened(norm, widened(compress, x.to(accumulation_dtype(x, first_tensor(self)))))
            q = expand(source.to(x.dtype))
        q, entries = self.latents(x, q, at)
        return q, entries, entries[..., :0], source

    def rotate(self, *heads: Tensor, at: Tensor) -> list[Tensor]:
        if self.config.position == "none":
            return list(heads)
        tables = rotary_tables(at, self.config.shared, self.config.rotary_base, self.config.scaling)
        return [rotate(each, tables) for each in heads]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None, start: Tensor | None) -> Tensor:
        def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if chosen is None:
                return ops.attention(q, k, v, scale=self.config.scale, key_start=start)
            lists = chosen.unsqueeze(2).expand(-1, -1, k.shape[2], -1)
            return ops.block_sparse_attention(q, k, v, lists, 1, scale=self.config.scale, key_start=start)

        return self.read_latents(q, k, read, self.config.top_k)

    def scored(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float | None]:
        with torch.no_grad():  # the loss is of the indexer alone
            if self.is_absorbed(q.shape[1], k.shape[1], None):
                return self.absorb(q), k, self.config.scale
            return q, self.expanded(k)[0], self.config.scale

    def caches(self, length: int) -> list[CacheShape]:
        return [CacheShape(length, 1, self.config.rank + self.config.shared, 0), *self.index_caches(length)]

    def read_flops(self, queries: int, keys: int, batch_size: int) -> int:
        return batch_size * min(self.costs(queries, keys, self.config.top_k))
