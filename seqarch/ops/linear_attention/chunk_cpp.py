"""The compiled CPU kernel (``csrc/cpu/linear_attention.cpp``): chunks of 64 tokens, one token in a single pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from seqarch.ops.chunked.recurrence import differentiable, room_for_gradients
from seqarch.ops.linear_attention import chunk_torch
from seqarch.ops.native import cpu_library
from seqarch.ops.native.cpu_library import Heads, Offsets, Pointer, float64, int32, int64
from seqarch.ops.native.huge_pages import like

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, Heads, Heads, Heads, Heads, int32, float64, Pointer)
_PROBLEM = (Offsets, int64, int64, int64, int64, int64, int64)
_forward = cpu_library.Kernel("linear_attention_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = cpu_library.Kernel("linear_attention_backward", *_INPUTS, Heads, *[Pointer] * 6, *_PROBLEM)

unavailable = cpu_library.unavailable


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> str | None:
    return None if q.device.type == "cpu" else f"q is on {q.device}, expected cpu"


def _inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, state: Tensor) -> tuple[Any, ...]:
    """Arguments of the kernels, copied where the last dimension is strided."""
    per_key = False
    if log_decay is not None and log_decay.ndim == 4:
        per_key, log_decay = True, cpu_library.rows(log_decay)
    heads = cpu_library.rows(q), cpu_library.rows(k), cpu_library.rows(v), log_decay
    return cpu_library.DTYPES[v.dtype], *heads, per_key, scale, state.contiguous()


def _problem(q: Tensor, v: Tensor, state: Tensor, cu_seqlens: Sequence[int] | None) -> tuple[Any, ...]:
    return cu_seqlens, state.shape[0], q.shape[1], q.shape[2], v.shape[2], q.shape[3], v.shape[3]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """``q, k, v`` of one dtype, ``log_decay`` and ``state`` in that of sums."""
    outputs = like(v), like(state)
    _forward(*_inputs(q, k, v, log_decay, scale, state), *outputs, *_problem(q, v, state, cu_seqlens))
    return outputs


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Sequence[int] | None,
    do: Tensor,
    dstate_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = room_for_gradients(q, k, v, log_decay, state)
    upstream = cpu_library.rows(do), dstate_out.contiguous()
    inputs = _inputs(q, k, v, log_decay, scale, state)
    _backward(*inputs, *upstream, *gradients, *_problem(q, v, state, cu_seqlens))
    return gradients


recur = differentiable("linear_attention", forward, backward, chunk_torch.run, "cpu")


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    dtype = cpu_library.activation_dtype(state, q, k, v)
    if log_decay is not None:
        log_decay = cpu_library.stepwise(log_decay.to(state.dtype), v)
    o, state = recur(q.to(dtype), k.to(dtype), v.to(dtype), log_decay, scale, state, offsets)
    return o.to(v.dtype), state
