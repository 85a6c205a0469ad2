"""The compiled CPU kernel (``csrc/cpu/delta_rule.cpp``): chunks of 64 tokens, a single token in two passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from seqarch.ops.chunked.recurrence import differentiable, room_for_gradients
from seqarch.ops.delta_rule import chunk_torch
from seqarch.ops.native import cpu_library
from seqarch.ops.native.cpu_library import Heads, Offsets, Pointer, float64, int32, int64
from seqarch.ops.native.huge_pages import like

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, *[Heads] * 5, int32, Heads, Heads, float64, Pointer)
_PROBLEM = (Offsets, int64, int64, int64, int64, int64, int64)
_forward = cpu_library.Kernel("delta_rule_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = cpu_library.Kernel("delta_rule_backward", *_INPUTS, Heads, *[Pointer] * 9, *_PROBLEM)

unavailable = cpu_library.unavailable


def refuse(q: Tensor, *others: Any) -> str | None:
    return None if q.device.type == "cpu" else f"q is on {q.device}, expected cpu"


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    read: Tensor | None,
    erase: Tensor | None,
    scale: float,
    state: Tensor,
) -> tuple[Any, ...]:
    """Arguments of the kernels, copied where the last dimension is strided."""
    per_key = False
    if log_decay is not None and log_decay.ndim == 4:
        per_key, log_decay = True, cpu_library.rows(log_decay)
    apart = (None if each is None else cpu_library.rows(each) for each in (read, erase))
    heads = cpu_library.rows(q), cpu_library.rows(k), cpu_library.rows(v), beta, log_decay
    return cpu_library.DTYPES[v.dtype], *heads, per_key, *apart, scale, state.contiguous()


def _problem(q: Tensor, v: Tensor, state: Tensor, cu_seqlens: Sequence[int] | None) -> tuple[Any, ...]:
    return cu_seqlens, state.shape[0], q.shape[1], q.shape[2], v.shape[2], q.shape[3], v.shape[3]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    read: Tensor | None,
    erase: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """``q, k, v, read, erase`` of one dtype, ``beta``, ``log_decay`` and ``state`` in that of sums."""
    outputs = like(v), like(state)
    inputs = _inputs(q, k, v, beta, log_decay, read, erase, scale, state)
    _forward(*inputs, *outputs, *_problem(q, v, state, cu_seqlens))
    return outputs


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    read: Tensor | None,
    erase: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Sequence[int] | None,
    do: Tensor,
    dstate_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = room_for_gradients(q, k, v, beta, log_decay, read, erase, state)
    inputs = _inputs(q, k, v, beta, log_decay, read, erase, scale, state)
    upstream = cpu_library.rows(do), dstate_out.contiguous()
    _backward(*inputs, *upstream, *gradients, *_problem(q, v, state, cu_seqlens))
    return gradients


recur = differentiable("delta_rule", forward, backward, chunk_torch.plain, "cpu")


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    read: Tensor,
    erase: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    apart = [None if each is None or each is k else each for each in (read, erase)]
    dtype = cpu_library.activation_dtype(state, q, k, v, *(each for each in apart if each is not None))
    if log_decay is not None:
        log_decay = cpu_library.stepwise(log_decay.to(state.dtype), v)
    apart = [None if each is None else each.to(dtype) for each in apart]
    narrow = q.to(dtype), k.to(dtype), v.to(dtype), beta.to(state.dtype)
    o, state = recur(*narrow, log_decay, *apart, scale, state, offsets)
    return o.to(v.dtype), state
