"""The compiled CPU kernel (``csrc/cpu/linear_attention.cpp``): chunks of 64 tokens, one token in a single pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.common import native
from seqarch.ops.common.native import Heads, Offsets, Pointer, float64, int32, int64

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, Heads, Heads, Heads, Heads, int32, float64, Pointer)
_PROBLEM = (Offsets, int64, int64, int64, int64, int64, int64)
_forward = native.Kernel("linear_attention_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = native.Kernel("linear_attention_backward", *_INPUTS, Heads, *[Pointer] * 6, *_PROBLEM)

unavailable = native.unavailable


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
        per_key, log_decay = True, native.rows(log_decay)
    heads = native.rows(q), native.rows(k), native.rows(v), log_decay
    return native.DTYPES[v.dtype], *heads, per_key, scale, state.contiguous()


def _problem(q: Tensor, v: Tensor, state: Tensor, cu_seqlens: Sequence[int] | None) -> tuple[Any, ...]:
    return cu_seqlens, state.shape[0], q.shape[1], q.shape[2], v.shape[2], q.shape[3], v.shape[3]


@torch.library.custom_op("seqarch::linear_attention", mutates_args=(), device_types="cpu")
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
    outputs = native.like(v), native.like(state)
    _forward(*_inputs(q, k, v, log_decay, scale, state), *outputs, *_problem(q, v, state, cu_seqlens))
    return outputs


@forward.register_fake
def _(q, k, v, log_decay, scale, state, cu_seqlens):
    return native.like(v), native.like(state)


def _gradients(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, ...]:
    decay = state.new_empty(0) if log_decay is None else native.like(log_decay)
    return native.like(q), native.like(k), native.like(v), decay, native.like(state)


@torch.library.custom_op("seqarch::linear_attention_backward", mutates_args=(), device_types="cpu")
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
    """The gradients of q, k, v, log_decay (empty where that is ``None``) and state."""
    dq, dk, dv, ddecay, dstate = _gradients(q, k, v, log_decay, state)
    upstream = native.rows(do), dstate_out.contiguous()
    inputs = _inputs(q, k, v, log_decay, scale, state)
    _backward(*inputs, *upstream, dq, dk, dv, ddecay, dstate, *_problem(q, v, state, cu_seqlens))
    return dq, dk, dv, ddecay, dstate


@backward.register_fake
def _(q, k, v, log_decay, scale, state, cu_seqlens, do, dstate_out):
    return _gradients(q, k, v, log_decay, state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, log_decay, ctx.scale, state, ctx.cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, log_decay, state)


def _differentiate(ctx: Any, do: Tensor, dstate_out: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, state = ctx.saved_tensors
    dq, dk, dv, ddecay, dstate = backward(q, k, v, log_decay, ctx.scale, state, ctx.cu_seqlens, do, dstate_out)
    return dq, dk, dv, None if log_decay is None else ddecay, None, dstate, None


forward.register_autograd(_differentiate, setup_context=_save)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    dtype = native.activation_dtype(state, q, k, v)
    if log_decay is not None:
        log_decay = native.stepwise(log_decay.to(state.dtype), v)
    o, state = forward(q.to(dtype), k.to(dtype), v.to(dtype), log_decay, scale, state, offsets)
    return o.to(v.dtype), state
