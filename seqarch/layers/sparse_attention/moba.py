"""Mixture of block attention (MoBA): each query and head attends to the blocks whose mean key it likes best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.layers.attention.base import Place
from seqarch.layers.mixer import Device, first_tensor
from seqarch.layers.modules.kv_cache import KVCache, PackedKV
from seqarch.layers.modules.positions import block_of
from seqarch.layers.rows import join_rows, padded_to
from seqarch.layers.sparse_attention.base import BlockSparse, BlockSparseConfig
from seqarch.ops.dispatch.checks import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class MoBAConfig(BlockSparseConfig):
    """Options of :class:`MoBA`.

    Attributes:
        block_size: tokens of a block; the paper's 512 is for sequences of 8192.
        top_k: blocks that a query sees, its own included.
    """

    block_size: int = 512
    top_k: int = 3


class MoBAState(NamedTuple):
    """State of :class:`MoBA`.

    Attributes:
        conv: the short convolution's last inputs, or ``None`` without one.
        cache: keys (rotated) and values.
        sums: the sum of each block's keys, ``[B, blocks, G, K]``.
    """

    conv: Tensor | None
    cache: KVCache | PackedKV
    sums: Tensor

    def joined(self, others: Sequence[MoBAState]) -> MoBAState:
        """Its rows and then those of the others: each row's blocks count from its own first token."""
        conv, cache = (join_rows([state[i] for state in (self, *others)]) for i in range(2))
        return MoBAState(conv, cache, padded_to([state.sums for state in (self, *others)], 1, self.sums.dtype))


class MoBA(BlockSparse):
    """Softmax attention over a token's own block and the ``top_k - 1`` earlier ones with the largest ``q . mean(K)``.

    Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", section 2.2. Scores are not scaled, keys
    are averaged as they are attended to, and every query head chooses for itself. The own block is always chosen,
    counts towards ``top_k`` and is causal; no later block ever is. Not native sparse attention, which chooses a list a
    key head by compressed keys that it also attends to.

    From the authors' code it differs in two ways: ``top_k=1`` sees the own block alone, where their fast form sees
    everything, and a step of generation follows the same rule as training, where theirs is full attention. No gradient
    flows through the choice, as there. The sums of the blocks' keys are kept, so that a step costs the chosen blocks
    and one score an earlier block.
    """

    Config = MoBAConfig
    State = MoBAState

    def select(self, q: Tensor, k: Tensor, place: Place, *entries: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        (sums,), cu_seqlens = entries, place.cu_seqlens
        own = block_of(place.positions, self.config.block_size)
        count = self._blocks(place.length)
        if cu_seqlens is None:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
        else:
            lengths = [end - start for start, end in pairwise(cu_seqlens)]
            rows = torch.arange(len(lengths), device=k.device)
            rows = rows.repeat_interleave(torch.tensor(lengths, device=k.device), output_size=k.shape[1])[None]
        sums = F.pad(sums, (0, 0, 0, 0, 0, max(0, count - sums.shape[1])))
        at = (rows * sums.shape[1] + own).flatten()
        sums = sums.flatten(0, 1).index_add(0, at, k.to(sums.dtype).flatten(0, 1)).unflatten(0, sums.shape[:2])
        means = sums[:, : max(0, count - 1)].detach() / self.config.block_size
        if cu_seqlens is None:
            return (self._choose(q.detach(), means, own),), (sums,)
        pieces = zip(q.detach().split(lengths, 1), means.split(1), own.split(lengths, 1), strict=True)
        return (torch.cat([self._choose(*piece) for piece in pieces], dim=1),), (sums,)

    def _choose(self, q: Tensor, means: Tensor, own: Tensor) -> Tensor:
        """``[B, T, H, top_k]``, or less where blocks are fewer, from the means ``[B, N, G, K]`` of all but the last."""
        scores = torch.einsum("btgrk,bngk->btgrn", q.to(means.dtype).unflatten(2, (means.shape[2], -1)), means)
        later = torch.arange(means.shape[1], device=q.device) >= own[..., None]
        scores = scores.flatten(2, 3).masked_fill(later.unsqueeze(2), -torch.inf)
        best, blocks = scores.topk(min(self.config.top_k - 1, means.shape[1]), dim=-1)
        own = own[..., None, None].expand(*q.shape[:3], 1)
        return torch.cat([own, blocks.masked_fill(best == -torch.inf, -1)], dim=-1)

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> MoBAState:
        conv, cache = super().new_state(batch_size, max_length, device, dtype)
        keys = cache.keys
        shape = batch_size, self._blocks(max_length), *keys.shape[2:]
        return MoBAState(conv, cache, keys.new_zeros(shape, dtype=accumulation_dtype(keys)))

    def _blocks(self, length: int) -> int:
        return -(-length // self.config.block_size)

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        width = self.config.kv_heads * self.config.head_width * accumulation_dtype(first_tensor(self)).itemsize
        return super().state_bytes(length, batch_size) + batch_size * self._blocks(length) * width

    def _score_flops(self, tokens: int, length: int, batch_size: int) -> int:
        """FLOPs of a score for each of these tokens and each block of ``length`` tokens but the last."""
        pairs = batch_size * tokens * max(0, self._blocks(length) - 1)
        return 2 * pairs * self.config.heads * self.config.head_width

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        chosen = self.earlier_block_flops(self.config.top_k - 1, length, batch_size)
        return chosen + self._score_flops(length, length, batch_size)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        before, after = (self._score_flops(n, n, batch_size) for n in (length, length + 1))
        return super().step_flops(length, batch_size) - (after - before) + self._score_flops(1, length + 1, batch_size)
