"""The reference: one query and key head at a time, over the blocks that are complete by then."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.compressed_attention.blocks import Blocks
from seqarch.ops.compressed_attention.inputs import CompressedAttentionInputs
from seqarch.ops.dispatch.checks import accumulation_dtype

TRANSFORMABLE = True


def run(inputs: CompressedAttentionInputs) -> tuple[Tensor, Tensor]:
    if inputs.offsets is not None:
        return inputs.each_sequence(run, inputs.offsets)
    blocks, wide = inputs.blocks, accumulation_dtype(inputs.q, inputs.k, inputs.v)
    q, k, v = (x.to(wide) for x in (inputs.q, inputs.k, inputs.v))
    groups, tokens = k.shape[2], inputs.tokens
    q = q.unflatten(2, (groups, q.shape[2] // max(1, groups)))  # [B, T, G, H / G, K]
    shared = shared_strides(blocks, k.shape[1], tokens, q.device)
    starts = [0] * len(q) if inputs.key_start is None else inputs.key_start.tolist()
    outputs, lists = [], []
    for row, first in enumerate(starts):
        for i in range(q.shape[1]):
            t = inputs.query_start + i - first
            seen = blocks.complete(t + 1)
            for g in range(groups):
                weights = (inputs.scale * q[row, i, g] @ k[row, :seen, g].T).softmax(-1)  # [H / G, n]
                outputs.append(weights @ v[row, :seen, g])
                importance = (weights.sum(0).unsqueeze(1) * shared[: weights.shape[1]]).sum(0)
                lists.append(selected(importance, t, blocks))
    nothing = 0 * (q.sum() + k.sum() + v.sum())  # keeps the gradients defined: zeros
    o = torch.stack(outputs) if outputs else nothing.expand(0, *q.shape[3:4], v.shape[3])
    index = torch.stack(lists) if lists else torch.empty(0, 0, dtype=torch.int64, device=q.device)
    o = o.reshape(*inputs.q.shape[:3], v.shape[3]).to(inputs.v.dtype)
    return o, index.reshape(*q.shape[:3], blocks.listed(tokens))


def shared_strides(blocks: Blocks, count: int, tokens: int, device: torch.device) -> Tensor:
    """How many strides of tokens each of so many compressed blocks shares with each selectable one: ``[M, J]``."""
    begin = torch.arange(count, device=device)[:, None] * blocks.stride
    block = torch.arange(blocks.selectable(tokens), device=device) * blocks.size
    end = (begin + blocks.length).clamp(max=block + blocks.size)
    return (end - begin.clamp(min=block)).clamp(min=0) // blocks.stride


def selected(importance: Tensor, t: int, blocks: Blocks) -> Tensor:
    """The list of a query at t: forced blocks, then the most important, then -1 where no more have begun."""
    own, block = t // blocks.size, torch.arange(len(importance), device=importance.device)
    forced = (block < blocks.initial) | (block > own - blocks.local)
    order = importance.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    index = order.sort(descending=True, stable=True).indices[: blocks.count]
    return index.masked_fill(index > own, -1)
