"""The compiled CPU kernel (``csrc/cpu/block_sparse_attention.cpp``): a block and the queries that list it, in tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention.lists import differentiable, outputs
from seqarch.ops.block_sparse_attention.starts import sequence_starts
from seqarch.ops.native import cpu_library
from seqarch.ops.native.cpu_library import Heads, Pointer, float64, int32, int64
from seqarch.ops.native.huge_pages import in_huge_pages

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, Heads, Heads, Heads, Pointer, int64, Pointer, int64, int64, int64, float64)
_PROBLEM = (int64,) * 8
_forward = cpu_library.Kernel("block_sparse_attention_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = cpu_library.Kernel(
    "block_sparse_attention_backward", *_INPUTS, Heads, Pointer, Heads, *[Pointer] * 3, *_PROBLEM
)

unavailable = cpu_library.unavailable


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
    return None if q.device.type == "cpu" else f"q is on {q.device}, expected cpu"


def _inputs(
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    first: Tensor,
    block_size: int,
    window: int,
    scale: float,
) -> tuple[Any, ...]:
    """Arguments of the kernels, of one dtype, copied where the last dimension is strided."""
    heads = (cpu_library.rows(x.to(dtype)) for x in (q, k, v))
    first = first.contiguous()
    stride = first.shape[1] if first.shape[0] > 1 else 0
    index = block_index.contiguous()
    return cpu_library.DTYPES[dtype], *heads, index, index.shape[3], first, stride, block_size, window, scale


def _problem(q: Tensor, k: Tensor, v: Tensor, block_index: Tensor) -> tuple[int, ...]:
    return *q.shape[:2], k.shape[1], k.shape[2], block_index.shape[2], q.shape[2], q.shape[3], v.shape[3]


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_index: Tensor, first: Tensor, block_size: int, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    o, log_sum = outputs(q, k, v)
    dtype = cpu_library.common_dtype(q, k, v)
    wide = o.to(dtype)
    inputs = _inputs(dtype, q, k, v, block_index, first, block_size, window, scale)
    _forward(*inputs, wide, log_sum, *_problem(q, k, v, block_index))
    return wide.to(o.dtype), log_sum


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    first: Tensor,
    o: Tensor,
    log_sum: Tensor,
    block_size: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = cpu_library.common_dtype(q, k, v)
    dq, dk, dv = (in_huge_pages(torch.empty(x.shape, dtype=dtype)) for x in (q, k, v))
    inputs = _inputs(dtype, q, k, v, block_index, first, block_size, window, scale)
    upstream = cpu_library.rows(o.to(dtype)), log_sum.contiguous(), cpu_library.rows(do.to(dtype))
    _backward(*inputs, *upstream, dq, dk, dv, *_problem(q, k, v, block_index))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


NAME = "block_sparse_attention_compiled"
attend = differentiable(NAME, forward, backward, blocks=lambda block_index: block_index)


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
    first = sequence_starts(q.shape[1], offsets, key_start, q.device)
    return attend(q, k, v, block_index, first, block_size, window, scale)[0]
