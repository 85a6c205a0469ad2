"""The reference: one query at a time, over the keys that it sees and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention.inputs import BlockSparseAttentionInputs
from seqarch.ops.chunked.packing import split_sequences
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.dispatch.eager import is_batched

TRANSFORMABLE = True


def unsupported(inputs: BlockSparseAttentionInputs) -> str | None:
    batched = is_batched(inputs.block_index)
    return "block_index is batched by vmap, and its values are asked for" if batched else None


def run(inputs: BlockSparseAttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    wide, (batch, queries, heads, _) = accumulation_dtype(inputs.q, inputs.k, inputs.v), inputs.q.shape
    q, k, v, index = inputs.q.to(wide), inputs.k.to(wide), inputs.v.to(wide), inputs.block_index
    if not batch * queries:
        nothing = 0 * (q.sum() + k.sum() + v.sum())  # keeps the gradients defined: zeros
        o, lse = nothing.expand(batch, queries, heads, v.shape[3]), nothing.expand(batch, queries, heads)
    elif inputs.offsets is not None:
        sequences = split_sequences(inputs.offsets, q, k, v, index)
        found = [_attend(inputs, q[0], k[0], v[0], index[0], 0) for q, k, v, index in sequences if q.shape[1]]
        o, lse = (torch.cat(each)[None] for each in zip(*found, strict=True))
    else:
        starts = [0] * batch if inputs.key_start is None else inputs.key_start.tolist()
        found = [_attend(inputs, *each) for each in zip(q, k, v, index, starts, strict=True)]
        o, lse = (torch.stack(each) for each in zip(*found, strict=True))
    return (o.to(inputs.v.dtype), lse) if inputs.return_lse else o.to(inputs.v.dtype)


def _attend(
    inputs: BlockSparseAttentionInputs, q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """o and the logarithms of one sequence without a batch dimension, whose keys begin at ``first``."""
    lists, groups, shift = block_index.shape[1], k.shape[1], k.shape[0] - q.shape[0]
    q = q.unflatten(1, (lists, -1)) * inputs.scale  # [Tq, I, H / I, K]
    keys, values = ([x.unbind(1)[head * groups // lists] for head in range(lists)] for x in (k, v))
    outputs, sums = [], []
    for i, (query, listed) in enumerate(zip(q, block_index.tolist(), strict=True)):
        for head, blocks in enumerate(listed):
            tokens = _visible(i + shift - first, blocks, inputs.block_size, inputs.window)
            seen = torch.tensor(tokens, dtype=torch.int64, device=q.device) + first
            scores = query[head] @ keys[head].index_select(0, seen).T
            outputs.append(scores.softmax(dim=-1) @ values[head].index_select(0, seen))
            sums.append(scores.logsumexp(dim=-1))
    o, lse = (torch.cat(each).unflatten(0, (q.shape[0], -1)) for each in (outputs, sums))
    return o, lse


def _visible(position: int, blocks: list[int], block_size: int, window: int) -> list[int]:
    """The tokens that a query at a position sees."""
    near = range(max(0, position - window + 1), position + 1) if window else range(0)
    listed = (range(block * block_size, (block + 1) * block_size) for block in blocks if block >= 0)
    return sorted({token for tokens in (near, *listed) for token in tokens if token <= position})
