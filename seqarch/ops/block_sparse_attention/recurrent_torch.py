"""The reference: one query at a time, over the keys that it sees and no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import each_sequence
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.dispatch.eager import is_batched

TRANSFORMABLE = True


def refuse(q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, *others: Any) -> str | None:
    return "block_index is batched by vmap, and its values are asked for" if is_batched(block_index) else None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_size: int,
    window: int,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> Tensor:
    wide = accumulation_dtype(q, k, v)

    def row(q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, first: int) -> Tensor:
        """One sequence without a batch dimension, whose keys begin at ``first``."""
        lists, shift = block_index.tolist(), k.shape[0] - q.shape[0]
        q = q.unflatten(1, (block_index.shape[1], -1)) * scale  # [Tq, I, H / I, K]
        keys, values = ([x.unbind(1)[head * x.shape[1] // q.shape[1]] for head in range(q.shape[1])] for x in (k, v))
        outputs = []
        for i, query in enumerate(q):
            for head, blocks in enumerate(lists[i]):
                tokens = _visible(i + shift - first, blocks, block_size, window)
                seen = torch.tensor(tokens, dtype=torch.int64, device=q.device) + first
                weights = (query[head] @ keys[head].index_select(0, seen).T).softmax(dim=-1)
                outputs.append(weights @ values[head].index_select(0, seen))
        return torch.cat(outputs).unflatten(0, (q.shape[0], -1))

    def all_rows(q: Tensor, k: Tensor, v: Tensor, block_index: Tensor) -> Tensor:
        if not q.shape[0] * q.shape[1]:
            nothing = 0 * (q.sum() + k.sum() + v.sum())  # keeps the gradients defined: zeros
            return nothing.expand(*q.shape[:3], v.shape[3])
        starts = [0] * q.shape[0] if key_start is None else key_start.tolist()
        return torch.stack([row(*each) for each in zip(q, k, v, block_index, starts, strict=True)])

    return each_sequence(all_rows, offsets, q.to(wide), k.to(wide), v.to(wide), block_index).to(v.dtype)


def _visible(position: int, blocks: list[int], block_size: int, window: int) -> list[int]:
    """The tokens that a query at a position sees."""
    near = range(max(0, position - window + 1), position + 1) if window else range(0)
    listed = (range(block * block_size, (block + 1) * block_size) for block in blocks if block >= 0)
    return sorted({token for tokens in (near, *listed) for token in tokens if token <= position})
