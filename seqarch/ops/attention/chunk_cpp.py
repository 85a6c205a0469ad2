"""The compiled CPU kernel (``csrc/cpu/attention.cpp``): 64 queries over 64 keys at a time, with an online softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.attention import gradient
from seqarch.ops.common import native
from seqarch.ops.common.checks import accumulation_dtype
from seqarch.ops.common.native import Heads, Offsets, Pointer, float64, int32, int64

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, Heads, Heads, Heads, int32, int64, float64, Pointer)
_PROBLEM = (Offsets, *[int64] * 7)
_forward = native.Kernel("attention_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = native.Kernel("attention_backward", *_INPUTS, Heads, Pointer, Heads, *[Pointer] * 3, *_PROBLEM)

unavailable = native.unavailable


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> str | None:
    return None if q.device.type == "cpu" else f"q is on {q.device}, expected cpu"


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float, key_start: Tensor | None
) -> tuple[Any, ...]:
    """Arguments of the kernels, copied where the last dimension is strided."""
    start = None if key_start is None else key_start.contiguous()
    return native.DTYPES[v.dtype], native.rows(q), native.rows(k), native.rows(v), causal, window, scale, start


def _problem(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int] | None) -> tuple[Any, ...]:
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return cu_seqlens, sequences, q.shape[1], k.shape[1], k.shape[2], q.shape[2], q.shape[3], v.shape[3]


def _outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.shape[3]), v.new_empty(q.shape[:3], dtype=accumulation_dtype(v))


@torch.library.custom_op("seqarch::attention", mutates_args=(), device_types="cpu")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int,
    scale: float,
    key_start: Tensor | None,
    cu_seqlens: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """o, and base-2 logarithms of the softmax's sums. ``q, k, v`` of one dtype, ``key_start`` int64, no window: 0."""
    outputs = _outputs(q, k, v)
    _forward(*_inputs(q, k, v, causal, window, scale, key_start), *outputs, *_problem(q, k, v, cu_seqlens))
    return outputs


@forward.register_fake
def _(q, k, v, causal, window, scale, key_start, cu_seqlens):
    return _outputs(q, k, v)


@torch.library.custom_op("seqarch::attention_backward", mutates_args=(), device_types="cpu")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int,
    scale: float,
    key_start: Tensor | None,
    cu_seqlens: Sequence[int] | None,
    o: Tensor,
    log_sum: Tensor,
    do: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from what forward returned and the gradient of o."""
    gradients = native.like(q), native.like(k), native.like(v)
    outputs = native.rows(o), log_sum.contiguous(), native.rows(do)
    inputs = _inputs(q, k, v, causal, window, scale, key_start)
    _backward(*inputs, *outputs, *gradients, *_problem(q, k, v, cu_seqlens))
    return gradients


@backward.register_fake
def _(q, k, v, causal, window, scale, key_start, cu_seqlens, o, log_sum, do):
    return native.like(q), native.like(k), native.like(v)


gradient.register(forward, backward)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> Tensor:
    dtype = native.common_dtype(q, k, v)
    start = None if key_start is None else key_start.long()
    return forward(q.to(dtype), k.to(dtype), v.to(dtype), causal, window or 0, scale, start, offsets)[0].to(v.dtype)
