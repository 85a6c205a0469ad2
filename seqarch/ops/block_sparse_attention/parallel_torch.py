"""All pairs of queries and keys, masked: for derivatives of any kind, at the cost and memory of full attention."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention.inputs import BlockSparseAttentionInputs, ListInputs
from seqarch.ops.chunked.packing import split_sequences
from seqarch.ops.chunked.softmax import masked_logsumexp, masked_softmax
from seqarch.ops.dispatch.checks import accumulation_dtype

TRANSFORMABLE = True


def run(inputs: BlockSparseAttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    o, lse = _attend(inputs)
    return (o, lse) if inputs.return_lse else o


def _attend(inputs: BlockSparseAttentionInputs) -> tuple[Tensor, Tensor]:
    if inputs.offsets is None:
        return attend(ListInputs.of(inputs))
    sequences = split_sequences(inputs.offsets, inputs.q, inputs.k, inputs.v, inputs.block_index)
    alone = (inputs.replace(q=q, k=k, v=v, block_index=index, offsets=None) for q, k, v, index in sequences)
    outputs, sums = zip(*(attend(ListInputs.of(each)) for each in alone), strict=True)
    return torch.cat(outputs, dim=1), torch.cat(sums, dim=1)


def attend(inputs: ListInputs) -> tuple[Tensor, Tensor]:
    """o ``[B, Tq, H, V]`` in v's dtype and the logarithms of the sums ``[B, Tq, H]``, for lists of blocks."""
    q, k, v = inputs.q, inputs.k, inputs.v
    wide, lists, groups = accumulation_dtype(q, k, v), inputs.lists.shape[2], k.shape[2]
    seen = visible(inputs.lists, inputs.first, k.shape[1], inputs.block_size, inputs.window)
    queries = (q.to(wide) * inputs.scale).unflatten(2, (groups, lists // groups, -1))  # [B, Tq, G, I / G, H / I, K]
    scores = torch.einsum("btgirk,bsgk->btgirs", queries, k.to(wide))
    seen = seen.unflatten(2, (groups, -1)).unsqueeze(4)
    o = torch.einsum("btgirs,bsgv->btgirv", masked_softmax(scores, seen), v.to(wide))
    return o.flatten(2, 4).to(v.dtype), masked_logsumexp(scores, seen).flatten(2, 4)


def visible(block_index: Tensor, first: Tensor, keys: int, block_size: int, window: int) -> Tensor:
    """Which keys each list's queries see: booleans ``[B, Tq, I, Tk]``."""
    queries, key = block_index.shape[1], torch.arange(keys, device=block_index.device)
    at = torch.arange(keys - queries, keys, device=block_index.device)[:, None]
    own, begun = key - first[..., None], (key <= at) & (key >= first[..., None])  # [B or 1, Tq, Tk]
    count = -(-keys // block_size)  # blocks that there are; one more place for those that are not
    there = (block_index >= 0) & (block_index < count)
    listed = torch.zeros(*block_index.shape[:3], count + 1, dtype=torch.bool, device=block_index.device)
    listed = listed.scatter(-1, block_index.where(there, count), True)
    block = (own.clamp(min=0) // block_size).unsqueeze(2).expand(*block_index.shape[:3], -1)
    seen = listed.gather(-1, block)
    if window:
        seen = seen | (at - key < window)[:, None]
    return seen & begun.unsqueeze(2)
