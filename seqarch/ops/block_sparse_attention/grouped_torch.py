"""Some blocks at a time, each with the queries that list it: a block is read once for many queries, in dense products.

A first pass over the blocks finds the logarithm of each softmax's sum, so that a second can add up outputs without
keeping one per block (Lu et al. 2025, "MoBA", algorithm 1, keeps them). The backward pass computes the weights again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention.inputs import BlockSparseAttentionInputs, ListInputs
from seqarch.ops.block_sparse_attention.lists import ListOperators, attend, hidden, zero_outputs
from seqarch.ops.native.custom_op import Upstream, as_given

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Numbers gathered or scored at a time."""

TILE = 128
"""Rows of one product: queries times the heads that share a list."""

LEAST_BLOCK = 16


def unsupported(inputs: BlockSparseAttentionInputs) -> str | None:
    if (size := inputs.block_size) < LEAST_BLOCK:
        return f"blocks of {size} tokens are too short for products of their own, expected {LEAST_BLOCK} or more"
    return None


class _Chunk(NamedTuple):
    """C tiles of n queries, each with one block.

    Attributes:
        pairs: ``[C n]``, the entry of the lists that each query stands for; their number where a tile is not full.
        lists: ``[C n]``, the list of each query, counted over rows, queries and heads of lists.
        keys: ``[C b]``, where the block's keys are in k laid out as ``[B Tk G, K]``.
        hidden: ``[C, n, 1, b]``, the keys that a query does not see.
    """

    pairs: Tensor
    lists: Tensor
    keys: Tensor
    hidden: Tensor


class _Tiles:
    """Every entry of the lists, sorted by block and cut into tiles of queries that share one."""

    def __init__(self, inputs: ListInputs):
        q, k, v, entries, block_size = inputs.q, inputs.k, inputs.v, inputs.lists, inputs.block_size
        _, self.queries, self.heads, self.listed = entries.shape
        self.key_shape, self.window, shared = k.shape, inputs.window, q.shape[2] // self.heads
        self.size = max(1, min(TILE // shared, self.queries))
        self.entries = entries.flatten()
        self.inside = torch.arange(block_size, device=q.device)
        pairs = (self.entries >= 0).nonzero().squeeze(1)
        starts = (inputs.first[..., None, None] + (entries >> 1) * block_size).flatten()[pairs]
        row, head = pairs // (self.listed * self.heads * self.queries), pairs // self.listed % self.heads
        blocks = (row * self.heads + head) * k.shape[1] + starts
        blocks, order = blocks.sort(stable=True)
        blocks, counts = blocks.unique_consecutive(return_counts=True)
        tiles = (counts + self.size - 1) // self.size
        padding = (tiles * self.size - counts).cumsum(0) - (tiles * self.size - counts)
        slots = torch.arange(len(pairs), device=q.device) + padding.repeat_interleave(counts)
        self.blocks = blocks.repeat_interleave(tiles)
        self.table = pairs.new_full((len(self.blocks) * self.size,), len(self.entries))
        self.table[slots] = pairs[order]
        widths = q.shape[3] + v.shape[3]
        numbers = self.size * shared * (widths + block_size) + block_size * widths
        self.chunk = max(1, CHUNK_ELEMENTS.get(q.device.type, 2**22) // numbers)

    def __iter__(self) -> Iterator[_Chunk]:
        tables = self.table.split(self.chunk * self.size)
        return map(self._chunk, self.blocks.split(self.chunk), tables) if len(self.blocks) else iter(())

    def _chunk(self, blocks: Tensor, pairs: Tensor) -> _Chunk:
        _, length, key_heads, _ = self.key_shape
        times = (blocks % length)[:, None] + self.inside
        heads = (blocks // length)[:, None]
        row, head = heads // self.heads, heads % self.heads * key_heads // self.heads
        padded = pairs == len(self.entries)
        # by a query of the same tile, so that a number that is not finite stays among those that share its block
        some = torch.where(padded, pairs[:: self.size].repeat_interleave(self.size), pairs)
        of_list = some // self.listed
        at = of_list // self.heads % self.queries + length - self.queries
        entries = self.entries[some].masked_fill(padded, -1)
        entries, at = (x.view(len(blocks), -1, 1) for x in (entries, at))
        # no key after all queries of the tile is read: in packed sequences it may be of the next one
        keys = (row * length + torch.minimum(times, at.amax(1))) * key_heads + head
        unseen = hidden(entries, times.unsqueeze(1), at, self.window)
        return _Chunk(pairs, of_list, keys.flatten(), unseen.unsqueeze(2))


def _flat(x: Tensor, count: int) -> Tensor:
    """``[B, T, H, ...]`` to a row per list, ``[B T I, ...]``."""
    return x.reshape(x.shape[0] * x.shape[1] * count, -1)


def _scores(chunk: _Chunk, q: Tensor, k: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[C, n H / I, K]``, keys ``[C, b, K]`` and scores ``[C, n, H / I, b]``, -inf where hidden."""
    tiles, size = chunk.hidden.shape[:2]
    query = q.index_select(0, chunk.lists).view(tiles, -1, width)
    keys = k.index_select(0, chunk.keys).view(tiles, -1, width)
    scores = (query @ keys.mT).unflatten(1, (size, -1))
    return query, keys, scores.masked_fill_(chunk.hidden, -torch.inf)


def _in_rows(inputs: ListInputs, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries a row per list ``[B Tq I, H / I K]``, keys ``[B Tk G, K]`` and values ``[B Tk G, V]``."""
    keys, values = (x.to(wide).reshape(-1, x.shape[3]) for x in (inputs.k, inputs.v))
    return _flat(inputs.q.to(wide) * inputs.scale, inputs.lists.shape[2]), keys, values


def forward(inputs: ListInputs) -> tuple[Tensor, Tensor]:
    o, log_sum = zero_outputs(inputs)
    if inputs.empty():
        return o, log_sum
    q, v, entries, wide = inputs.q, inputs.v, inputs.lists, log_sum.dtype
    tiles, count = _Tiles(inputs), entries.shape[2]
    query_rows, key_rows, value_rows = _in_rows(inputs, wide)
    each = log_sum.new_full((entries.numel() + 1, q.shape[2] // count), -torch.inf)
    for chunk in tiles:
        *_, scores = _scores(chunk, query_rows, key_rows, q.shape[3])
        each[chunk.pairs] = scores.logsumexp(-1).flatten(0, 1)
    total = each[:-1].view(-1, entries.shape[3], each.shape[1]).logsumexp(1).clamp(min=torch.finfo(wide).min)
    o_rows = torch.zeros(len(total), each.shape[1] * v.shape[3], dtype=wide, device=v.device)
    for chunk in tiles:
        *_, scores = _scores(chunk, query_rows, key_rows, q.shape[3])
        weights = scores.sub_(total[chunk.lists].view(*scores.shape[:3], 1)).exp_().flatten(1, 2)
        values = value_rows.index_select(0, chunk.keys).view(len(scores), -1, v.shape[3])
        o_rows.index_add_(0, chunk.lists, (weights @ values).view(len(chunk.lists), -1))
    return o_rows.view(o.shape).to(o.dtype), total.view(log_sum.shape)


def backward(inputs: ListInputs, upstream: Upstream) -> list[Tensor]:
    (o, log_sum), (do, *dlse) = upstream.kept, upstream.gradients
    q, v, wide, count = inputs.q, inputs.v, log_sum.dtype, inputs.lists.shape[2]
    if inputs.empty():
        return as_given(inputs, (*(torch.zeros_like(x) for x in (q, inputs.k, v)), None, None))
    query_rows, key_rows, value_rows = rows = _in_rows(inputs, wide)
    dq, dk, dv = (torch.zeros_like(x) for x in rows)
    tiles, do = _Tiles(inputs), do.to(wide)
    own = _flat(sum((-each for each in dlse), (do * o).sum(-1)), count)
    total, do = _flat(log_sum, count), _flat(do, count)
    for chunk in tiles:
        query, keys, scores = _scores(chunk, query_rows, key_rows, q.shape[3])
        weights = scores.sub_(total[chunk.lists].view(*scores.shape[:3], 1)).exp_().flatten(1, 2)
        values = value_rows.index_select(0, chunk.keys).view(len(scores), -1, v.shape[3])
        grad = do.index_select(0, chunk.lists).view(len(scores), -1, v.shape[3])
        dv.index_add_(0, chunk.keys, (weights.mT @ grad).flatten(0, 1))
        dscores = (grad @ values.mT).sub_(own[chunk.lists].view(len(scores), -1, 1)).mul_(weights)
        dq.index_add_(0, chunk.lists, (dscores @ keys).view(len(chunk.lists), -1))
        dk.index_add_(0, chunk.keys, (dscores.mT @ query).flatten(0, 1))
    return as_given(inputs, (dq.mul_(inputs.scale), dk, dv, None, None))


operators = ListOperators("block_sparse_attention_grouped", forward, backward)


def run(inputs: BlockSparseAttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    return attend(operators, inputs)
