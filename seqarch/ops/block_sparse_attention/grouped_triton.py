"""Triton kernels, a block of keys at a time with the queries that list it: full tiles for any number of heads a list.

The pairs of a query and a block that it lists are sorted by block, so that a block is read once for many queries (as Lu
et al. 2025, "MoBA", algorithm 1, which keeps outputs a block as this does); those of one query a row, which has next to
none to share its blocks with, stay as they are. Each pair has an output of its own, and these are combined by their
sums. Backward, the pairs of a block are walked through in the same order by the program that adds up the gradients of
its keys. Memory beyond inputs and outputs is bounded: heads take turns. Nothing waits for the device. Products are as
in ``attention``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention import lists
from seqarch.ops.block_sparse_attention.lists import differentiable, outputs
from seqarch.ops.dispatch.checks import promoted_dtype
from seqarch.ops.triton import availability

LEAST_BLOCK = 16
"""Keys of the smallest tile that a tensor core multiplies."""

unavailable = availability.unavailable


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_size: int,
    window: int,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> str | None:
    return availability.refuse_attention(q, k, v)


def yields(q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, block_size: int, *others: Any) -> str | None:
    if block_size < LEAST_BLOCK and q.shape[1] > 1:
        return f"blocks of {block_size} tokens leave most of a tile empty, which has {LEAST_BLOCK} keys or more"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, entries: Tensor, first: Tensor, block_size: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    from seqarch.ops.block_sparse_attention.launches_triton import Part, slices

    o, log_sum = outputs(q, k, v)
    if not q.numel() * k.numel() * v.numel() * entries.numel():
        return o, log_sum
    dtype, shared = promoted_dtype(q, k, v), q.shape[2] // entries.shape[2]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    wide = o.to(dtype)
    for row, group, of in slices(entries, k.shape[2], shared, v.shape[3]):
        heads = slice(of.start * shared, of.stop * shared)
        part = Part(
            q[row, :, heads], k[row, :, group], v[row, :, group], entries[row, :, of], _of(first, row), block_size,
            window, scale,
        )  # fmt: skip
        part.forward(wide[row, :, heads], log_sum[row, :, heads])
    return wide.to(o.dtype), log_sum


def _of(first: Tensor, row: slice) -> Tensor:
    """The rows' own starts, where there is one a row."""
    return first[row] if first.shape[0] > 1 else first


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entries: Tensor,
    first: Tensor,
    o: Tensor,
    log_sum: Tensor,
    block_size: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from seqarch.ops.block_sparse_attention.launches_triton import Part, slices

    dtype, shared = promoted_dtype(q, k, v), q.shape[2] // entries.shape[2]
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    if q.numel() * k.numel() * v.numel() * entries.numel():
        between = (do.to(log_sum.dtype) * o.to(log_sum.dtype)).sum(-1)
        wide = [x.to(dtype) for x in (q, k, v)]
        for row, group, of in slices(entries, k.shape[2], shared, q.shape[3]):
            heads = slice(of.start * shared, of.stop * shared)
            inputs = wide[0][row, :, heads], wide[1][row, :, group], wide[2][row, :, group]
            part = Part(*inputs, entries[row, :, of], _of(first, row), block_size, window, scale)
            part.differentiate(
                do[row, :, heads].to(dtype), log_sum[row, :, heads], between[row, :, heads], dq[row, :, heads],
                dk[row, :, group], dv[row, :, group],
            )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


NAME = "block_sparse_attention_triton"
attend = differentiable(NAME, forward, backward)
run = partial(lists.run, attend)
