"""The compiled CPU kernel (``csrc/cpu/attention.cpp``): 64 queries over 64 keys at a time, with an online softmax."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from seqarch.ops.attention import operators
from seqarch.ops.native import cpu_library
from seqarch.ops.native.cpu_library import Heads, Offsets, Pointer, float64, int32, int64

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, Heads, Heads, Heads, int32, int64, float64, Pointer)
_PROBLEM = (Offsets, *[int64] * 7)
_forward = cpu_library.Kernel("attention_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = cpu_library.Kernel("attention_backward", *_INPUTS, Heads, Pointer, Heads, *[Pointer] * 3, *_PROBLEM)

unavailable = cpu_library.unavailable


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
    return (
        cpu_library.DTYPES[v.dtype],
        cpu_library.rows(q),
        cpu_library.rows(k),
        cpu_library.rows(v),
        causal,
        window,
        scale,
        start,
    )


def _problem(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int] | None) -> tuple[Any, ...]:
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return cu_seqlens, sequences, q.shape[1], k.shape[1], k.shape[2], q.shape[2], q.shape[3], v.shape[3]


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
    """Logarithms are to base 2."""
    outputs = operators.outputs(q, k, v)
    _forward(*_inputs(q, k, v, causal, window, scale, key_start), *outputs, *_problem(q, k, v, cu_seqlens))
    return outputs


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
    gradients = operators.gradients(q, k, v)
    outputs = cpu_library.rows(o), log_sum.contiguous(), cpu_library.rows(do)
    inputs = _inputs(q, k, v, causal, window, scale, key_start)
    _backward(*inputs, *outputs, *gradients, *_problem(q, k, v, cu_seqlens))
    return gradients


attend = operators.differentiable("attention", forward, backward, "cpu")
run = partial(operators.run, attend, cpu_library.common_dtype)
