"""The compiled CPU kernel (``csrc/cpu/block_sparse_attention.cpp``): a block and the queries that list it, in tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention.inputs import BlockSparseAttentionInputs, ListInputs
from seqarch.ops.block_sparse_attention.lists import list_operator, zero_outputs
from seqarch.ops.native import cpu_library
from seqarch.ops.native.cpu_library import Heads, Pointer, float64, int32, int64
from seqarch.ops.native.custom_op import Upstream, as_given
from seqarch.ops.native.huge_pages import in_huge_pages

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, Heads, Heads, Heads, Pointer, int64, Pointer, int64, int64, int64, float64)
_PROBLEM = (int64,) * 8
_forward = cpu_library.Kernel("block_sparse_attention_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = cpu_library.Kernel(
    "block_sparse_attention_backward", *_INPUTS, Heads, Pointer, Heads, *[Pointer] * 3, *_PROBLEM
)

unavailable = cpu_library.unavailable


def unsupported(inputs: BlockSparseAttentionInputs) -> str | None:
    return None if inputs.device.type == "cpu" else f"q is on {inputs.device}, expected cpu"


def _arguments(inputs: ListInputs) -> tuple[Any, ...]:
    """Of both kernels, up to the scale; copied where the last dimension is strided."""
    heads = cpu_library.rows(inputs.q), cpu_library.rows(inputs.k), cpu_library.rows(inputs.v)
    lists, first = inputs.lists.contiguous(), inputs.first.contiguous()
    stride = first.shape[1] if first.shape[0] > 1 else 0
    sizes = inputs.block_size, inputs.window
    return cpu_library.DTYPES[inputs.v.dtype], *heads, lists, lists.shape[3], first, stride, *sizes, inputs.scale


def _sizes(inputs: ListInputs) -> tuple[int, ...]:
    (batch, queries, heads, keys), (_, length, groups, values) = inputs.q.shape, inputs.v.shape
    return batch, queries, length, groups, inputs.lists.shape[2], heads, keys, values


def forward(inputs: ListInputs) -> tuple[Tensor, Tensor]:
    o, log_sum = zero_outputs(inputs)
    inputs = inputs.to(cpu_library.common_dtype(inputs.q, inputs.k, inputs.v))
    wide = o.to(inputs.v.dtype)
    _forward(*_arguments(inputs), wide, log_sum, *_sizes(inputs))
    return wide.to(o.dtype), log_sum


def backward(inputs: ListInputs, upstream: Upstream) -> list[Tensor]:
    (o, log_sum), (do,) = upstream.kept, upstream.gradients
    dtype = cpu_library.common_dtype(inputs.q, inputs.k, inputs.v)
    wide = inputs.to(dtype)
    dq, dk, dv = (in_huge_pages(torch.empty(x.shape, dtype=dtype)) for x in (inputs.q, inputs.k, inputs.v))
    outputs = cpu_library.rows(o.to(dtype)), log_sum.contiguous(), cpu_library.rows(do.to(dtype))
    _backward(*_arguments(wide), *outputs, dq, dk, dv, *_sizes(wide))
    return as_given(inputs, (dq, dk, dv, None, None))


operator = list_operator("block_sparse_attention_compiled", forward, backward, blocks=lambda lists: lists)


def run(inputs: BlockSparseAttentionInputs) -> Tensor:
    return operator(ListInputs.of(inputs))[0]
