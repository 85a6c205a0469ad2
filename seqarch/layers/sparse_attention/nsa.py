"""Native sparse attention (NSA): compressed blocks of the past, the best blocks in full, and a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from seqarch import ops
from seqarch.layers.attention.options import KVHeadsConfig
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules import kv_cache
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadProjection
from seqarch.layers.modules.kv_cache import AnyCache, KVCache
from seqarch.layers.modules.linear import Linear
from seqarch.layers.rows import join_rows, padded_to
from seqarch.layers.sparse_attention.compression import BlockCompressor
from seqarch.layers.sparse_attention.row_attention import CacheShape, RowAttention, positions
from seqarch.ops.attention import flops as window_flops
from seqarch.ops.block_sparse_attention import flops as pair_flops
from seqarch.ops.compressed_attention import Blocks
from seqarch.ops.compressed_attention import flops as compressed_flops


@dataclass(frozen=True, kw_only=True)
class NSAConfig(KVHeadsConfig):
    """Options of :class:`NSA`; the defaults of lengths and counts are the paper's.

    Attributes:
        compressed_length, compressed_stride: of the blocks of tokens that are compressed to one key and value each.
        compressed_hidden: the inner width of their MLPs; by default 2 K.
        block_size: tokens of a block that may be selected; a multiple of the stride.
        selected_blocks: blocks that a query reads in full, the forced ones included.
        initial_blocks: of these, so many first ones of the sequence are forced.
        local_blocks: and so many last ones, the query's own included.
        window: tokens that the third branch sees, itself included.
    """

    may_be_zero = (*KVHeadsConfig.may_be_zero, "initial_blocks")

    compressed_length: int = 32
    compressed_stride: int = 16
    compressed_hidden: int | None = None
    block_size: int = 64
    selected_blocks: int = 16
    initial_blocks: int = 1
    local_blocks: int = 2
    window: int = 512

    def __post_init__(self):
        super().__post_init__()
        for name in ("compressed_length", "block_size"):
            if getattr(self, name) % self.compressed_stride:
                stride = f"compressed_stride ({self.compressed_stride})"
                raise ValueError(f"{name} ({getattr(self, name)}) must be a multiple of {stride}")
        if self.initial_blocks + self.local_blocks > self.selected_blocks:
            forced = f"{self.initial_blocks} initial and {self.local_blocks} local"
            raise ValueError(f"selected_blocks ({self.selected_blocks}) must hold the forced ones, {forced}")

    @property
    def blocks(self) -> Blocks:
        return Blocks.of(self)


class NSAState(NamedTuple):
    """State of :class:`NSA`.

    Attributes:
        recent: the last keys and values to compress, as they come: those of blocks that are not complete.
        compressed: the compressed keys (rotated) and values, ``length`` of them in the longest row; each row's begin
            at its first token, and ``start`` says how many fewer it has.
        selected, window: keys (rotated) and values of these branches.
    """

    recent: KVCache
    compressed: KVCache
    selected: KVCache
    window: KVCache

    def joined(self, others: Sequence[NSAState]) -> NSAState:
        """Its rows and then those of the others, right-aligned, but for the compressed keys."""
        states = self, *others
        recent, _, selected, window = (join_rows(caches) for caches in zip(*states, strict=True))
        return NSAState(recent, _join_compressed([state.compressed for state in states]), selected, window)


class NSA(RowAttention):
    r"""``o_t = sum_c g^c_t Attention(q_t, K^c_t, V^c_t)`` over three branches c: compressed, selected, window.

    Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention", section 3.
    Each branch has keys and values of its own; the gates ``g = sigmoid(W x)`` are one per head and branch.
    *Compressed*: an MLP makes one key and one value of each block of ``compressed_length`` tokens; a query sees the
    blocks that are complete, and gets 0 where none is. *Selected*: the blocks of ``block_size`` tokens that matter most
    by the first branch's weights, up to the query itself, one list for the query heads that share a key head. *Window*:
    the last tokens.

    Which blocks matter: block j of ``[j l', (j + 1) l')`` tokens weighs every compressed block i of ``[d i, d i + l)``
    by the strides d that the two share: ``sum over m < l'/d, n < l/d of p[(l'/d) j + m - n]``, blocks that do not exist
    or are not complete counting 0. That is the convention of open implementations. The paper's eq. 9 reads
    ``p[(l'/d) j - m - n]``, which is the same if blocks are counted from 1, and the block before if from 0. Forced
    blocks come first, then the most important, of equals the earlier; as many as there are, even those of weight 0. No
    gradient flows through the choice.

    Not MoBA, which scores blocks by their mean key and has no other branch, nor the variant in flash-linear-attention,
    whose branches share keys, averaged over blocks that do not overlap. Left open by the paper and chosen here: keys
    are compressed before they are rotated, and are at their block's first token; MLPs are shared by all heads, with
    silu; the gates have no bias. Projections and gates have ``nn.Linear``'s initialisation.

    A step costs T / d compressed scores, the selected blocks and the window.
    """

    Config = NSAConfig
    unquantized = ("gate",)
    State = NSAState

    @from_options
    def __init__(self, config: NSAConfig):
        super().__init__(config)
        heads, width = config.heads, config.head_width
        self.qkv_proj = HeadProjection(config.d_model, [(heads, width), *[(config.kv_heads, width)] * 6])
        block = (width, config.compressed_length, config.compressed_stride, config.compressed_hidden or 2 * width)
        self.compress_key, self.compress_value = BlockCompressor(*block), BlockCompressor(*block)
        self.gate = Linear(config.d_model, 3 * heads, bias=False)
        self.out_proj = Linear(heads * width, config.d_model, bias=False)

    def head_maps(self) -> list[HeadMap]:
        """The keys and values of the compressed blocks, the chosen ones and the window are three of each."""
        out = HeadMap("o", "out_proj", self.config.heads, self.config.head_width)
        return [*self.qkv_proj.head_maps("qkv_proj", "qkvkvkv"), out]

    def mix(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> tuple[Tensor, Any]:
        return self.in_rows(self.mix_rows, x, state, cu_seqlens)

    def mix_rows(self, x: Tensor, state: NSAState) -> tuple[Tensor, NSAState]:
        blocks, (before, start) = self.config.blocks, (state.selected.length, state.selected.start)
        # one set of queries, keys and values for each branch
        (q, k_new, v_new, k, v, k_near, v_near), _ = self.qkv_proj(x)
        q, k, k_near = self.rotate(q, k, k_near, at=positions(x, before, start))
        # compressed: block by block, which also chooses the blocks of the next branch
        recent, compressed = self._compress(state, k_new, v_new)
        keys, values = compressed.in_use(q.dtype)
        forced = {"initial_blocks": blocks.initial, "local_blocks": blocks.local}
        o, index = ops.compressed_attention(q, keys, values, *blocks[:4], **forced, query_start=before, key_start=start)
        # selected: the chosen blocks in full
        k, v, selected = kv_cache.extend(state.selected, k, v, None)
        o_selected = ops.block_sparse_attention(q, k, v, index, blocks.size, key_start=start)
        # window: the last tokens, of which the cache holds no more than a step sees
        near_start = state.window.first_held(self.config.window - 1)
        k, v, window = kv_cache.extend(state.window, k_near, v_near, self.config.window - 1)
        o_window = ops.attention(q, k, v, window=self.config.window, key_start=near_start)
        # a gate per head and branch
        gates = rearrange(self.gate(x).sigmoid(), "b t (c h) -> c b t h 1", c=3)
        o = gates[0] * o + gates[1] * o_selected + gates[2] * o_window
        y = self.out_proj(rearrange(o, "b t h v -> b t (h v)"))
        return y, NSAState(recent, compressed, selected, window)

    def _compress(self, state: NSAState, k: Tensor, v: Tensor) -> tuple[Any, Any]:
        """The first two entries of the state after these keys and values."""
        cache_window = self.config.compressed_length - 1
        keys, values, recent = kv_cache.extend(state.recent, k, v, cache_window)
        if recent.start is None or not len(keys):
            return recent, self._append(state.compressed, keys, values, recent.length)
        # rows of different lengths complete their blocks at different times
        first = state.recent.first_held(cache_window)
        lengths, firsts = recent.lengths().tolist(), [0] * len(keys) if first is None else first.tolist()
        rows = [
            self._append(old, keys[i : i + 1, firsts[i] :], values[i : i + 1, firsts[i] :], lengths[i])
            for i, old in enumerate(self._split_compressed(state.compressed, [n - k.shape[1] for n in lengths]))
        ]
        return recent, _join_compressed(rows)

    def _append(self, compressed: AnyCache, keys: Tensor, values: Tensor, length: int) -> AnyCache:
        """The cache with what the last keys and values, of ``length`` tokens in all, complete."""
        stride, old, new = self.config.compressed_stride, compressed.length, self.config.blocks.complete(length)
        if old == new and not torch.is_grad_enabled():  # with gradients, none are those of no blocks: zeros
            return compressed
        skipped = old * stride - (length - keys.shape[1])
        key, value = self.compress_key(keys[:, skipped:]), self.compress_value(values[:, skipped:])
        (key,) = self.rotate(key, at=torch.arange(old, new, device=key.device)[None] * stride)
        return kv_cache.extend(compressed, key, value, None)[2]

    def _split_compressed(self, compressed: AnyCache, lengths: list[int]) -> list[AnyCache]:
        if not isinstance(compressed, KVCache):
            return compressed.split_by(lambda part: self._split_compressed(part, lengths))
        rows = zip(compressed.keys.split(1), compressed.values.split(1), lengths, strict=True)
        return [KVCache(key, value, self.config.blocks.complete(length)) for key, value, length in rows]

    def split(self, state: NSAState) -> list[NSAState]:
        rows = super().split(state)
        compressed = self._split_compressed(state.compressed, [row.selected.length for row in rows])
        return [row._replace(compressed=each) for row, each in zip(rows, compressed, strict=True)]

    def join(self, states: list[NSAState]) -> NSAState:
        joined = super().join(states)
        return joined._replace(compressed=_join_compressed([state.compressed for state in states]))

    def caches(self, length: int) -> list[CacheShape]:
        config = self.config
        shape = (config.kv_heads, config.head_width, config.head_width)
        bounds = (config.compressed_length - 1, config.window - 1)
        recent, window = (CacheShape(min(length, cache_window), *shape, cache_window) for cache_window in bounds)
        return [recent, CacheShape(config.blocks.complete(length), *shape), CacheShape(length, *shape), window]

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return self._flops(length, 0, batch_size)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        once = self.flops(1, batch_size) - self.sequence_flops(1, batch_size)
        return once + self._flops(1, length, batch_size)

    def _flops(self, queries: int, before: int, batch_size: int) -> int:
        config, after = self.config, before + queries
        blocks, heads, width = config.blocks, config.heads, config.head_width
        new = batch_size * config.kv_heads * (blocks.complete(after) - blocks.complete(before))
        compress = sum(m.flops(new) for m in self.modules() if isinstance(m, BlockCompressor))
        scores = compressed_flops(queries, before, heads, width, width, blocks, batch_size)
        pairs = blocks.visible_pairs(after) - blocks.visible_pairs(before)
        selected = pair_flops(batch_size * heads * pairs, width, width)
        return (
            compress
            + scores
            + selected
            + window_flops(queries, after, heads, width, width, True, config.window, batch_size)
        )


def _join_compressed(caches: Sequence[Any]) -> Any:
    """The rows of several caches whose rows begin together, at the left."""
    if not isinstance(caches[0], KVCache):
        return caches[0].joined_by(_join_compressed, caches[1:])
    counts = torch.cat([cache.lengths().expand(len(cache.keys)) for cache in caches])
    longest = int(counts.max()) if len(counts) else 0
    fewer = longest - counts
    keys, values = (
        padded_to(part, 1, part[0].dtype) for part in list(zip(*((c.keys, c.values) for c in caches), strict=True))
    )
    return KVCache(keys, values, longest, fewer if bool(fewer.any()) else None)
