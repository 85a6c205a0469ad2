"""Triton kernels, a block of keys at a time with the queries that list it: full tiles for any number of heads per list.

The pairs of a query and a block that it lists are sorted by block, so that a block is read once for many queries (as Lu
et al. 2025, "MoBA", algorithm 1, which keeps outputs per block as this does); those of one query per row, which has
next to none to share its blocks with, stay as they are. Each pair has an output of its own, and these are combined by
their sums. Backward, the pairs of a block are walked through in the same order by the program that adds up the
gradients of its keys. Memory beyond inputs and outputs is bounded: heads take turns. Nothing waits for the device.
Products are as in ``attention``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention.inputs import BlockSparseAttentionInputs, ListInputs
from seqarch.ops.block_sparse_attention.lists import ListOperators, attend, zero_outputs
from seqarch.ops.dispatch.checks import promoted_dtype
from seqarch.ops.native.custom_op import Upstream, as_given
from seqarch.ops.triton import availability

LEAST_BLOCK = 16
"""Keys of the smallest tile that a tensor core multiplies."""

unavailable = availability.unavailable


def unsupported(inputs: BlockSparseAttentionInputs) -> str | None:
    return availability.unsupported_attention(inputs.q, inputs.k, inputs.v)


def deprioritised(inputs: BlockSparseAttentionInputs) -> str | None:
    if (size := inputs.block_size) < LEAST_BLOCK and inputs.length > 1:
        return f"blocks of {size} tokens leave most of a tile empty, which has {LEAST_BLOCK} keys or more"
    return None


def forward(inputs: ListInputs) -> tuple[Tensor, Tensor]:
    from seqarch.ops.block_sparse_attention.launches_triton import parts

    o, log_sum = zero_outputs(inputs)
    if inputs.empty():
        return o, log_sum
    inputs = inputs.to(promoted_dtype(inputs.q, inputs.k, inputs.v))
    wide = o.to(inputs.v.dtype)
    for part, row, heads, _ in parts(inputs, inputs.v.shape[3]):
        part.forward(wide[row, :, heads], log_sum[row, :, heads])
    return wide.to(o.dtype), log_sum


def backward(inputs: ListInputs, upstream: Upstream) -> list[Tensor]:
    from seqarch.ops.block_sparse_attention.launches_triton import parts

    (o, log_sum), (do, *dlse) = upstream.kept, upstream.gradients
    wide = inputs.to(promoted_dtype(inputs.q, inputs.k, inputs.v))
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (wide.q, wide.k, wide.v))
    if not inputs.empty():
        between = sum((-each for each in dlse), (do.to(log_sum.dtype) * o.to(log_sum.dtype)).sum(-1))
        for part, row, heads, group in parts(wide, wide.q.shape[3]):
            part.differentiate(
                do[row, :, heads].to(dq.dtype), log_sum[row, :, heads], between[row, :, heads], dq[row, :, heads],
                dk[row, :, group], dv[row, :, group],
            )  # fmt: skip
    return as_given(inputs, (dq, dk, dv, None, None))


operators = ListOperators("block_sparse_attention_triton", forward, backward)


def run(inputs: BlockSparseAttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    return attend(operators, inputs)
