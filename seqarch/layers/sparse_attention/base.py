"""The base of attentions over listed blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from seqarch import ops
from seqarch.layers.attention.base import CachedAttention
from seqarch.layers.attention.options import CachedAttentionConfig
from seqarch.ops.block_sparse_attention import flops as pair_flops


@dataclass(frozen=True, kw_only=True)
class BlockSparseConfig(CachedAttentionConfig):
    """Options that every attention over listed blocks has.

    Attributes:
        block_size: tokens of a block.
    """

    block_size: int = 64


class BlockSparse(CachedAttention):
    """Attention over the blocks that :meth:`select` lists for each query.

    Attributes:
        window: tokens that each token sees beside its blocks, itself included; ``None`` for none.
    """

    window: int | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *selection: Tensor, **where: Any) -> Tensor:
        (block_index,), size = selection, self.config.block_size
        # a fixed pattern lists blocks that have not begun
        block_index = block_index.masked_fill(block_index >= -(-k.shape[1] // size), -1)
        return ops.block_sparse_attention(q, k, v, block_index, size, window=self.window, **where)

    def earlier_block_flops(self, blocks: int, length: int, batch_size: int) -> int:
        """FLOPs where a token sees its own block up to itself, and so many of the blocks before, or all there are."""
        size, pairs = self.config.block_size, 0
        for start in range(0, length, size):
            queries = min(size, length - start)
            pairs += queries * (queries + 1) // 2 + queries * min(start, blocks * size)
        return pair_flops(batch_size * pairs * self.config.heads, self.config.head_width, self.config.head_width)
