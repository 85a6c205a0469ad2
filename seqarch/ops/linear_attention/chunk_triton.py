"""Triton kernels in chunks of 64 tokens (Yang et al. 2023, section 4), one family for every kind of decay.

Forward keeps nothing; backward computes the states before chunks again. Products of bfloat16 activations are bfloat16
with float32 sums; those of float16 and float32 ones are TF32, three products for one where float32 is asked to be
exact (``torch.set_float32_matmul_precision("highest")``, torch's default).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.common import gpu

unavailable = gpu.unavailable


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> str | None:
    return gpu.refuse_recurrence(q, v, state)


@torch.library.custom_op("seqarch::linear_attention_triton", mutates_args=(), device_types=("cpu", "cuda"))
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """``log_decay`` ``[B, T, H]`` or ``[B, T, H, K]``, ``state`` in the dtype of sums."""
    from seqarch.ops.common.launch_triton import rows
    from seqarch.ops.common.recurrence_triton import Recurrence

    call = Recurrence(k, v, (q, k, v), log_decay, state, cu_seqlens)
    queries, keys, values = rows(q), rows(k), rows(v)
    pairs = call.pairs(queries, keys, call.K, decayed=True, scale=scale)
    states, last = call.states(keys, values, state.contiguous(), 1.0, backward=False)
    o = call.outputs(queries, values, pairs, states, scale, v.dtype)
    return o.view(v.shape), last


@forward.register_fake
def _(q, k, v, log_decay, scale, state, cu_seqlens):
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op("seqarch::linear_attention_triton_backward", mutates_args=(), device_types=("cpu", "cuda"))
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
    from seqarch.ops.common.launch_triton import rows
    from seqarch.ops.common.recurrence_triton import Recurrence

    call = Recurrence(k, v, (q, k, v), log_decay, state, cu_seqlens)
    queries, keys, values, upstream = rows(q), rows(k), rows(v), rows(do)
    states, _ = call.states(keys, values, state.contiguous(), 1.0, backward=False)
    dstates, dstate = call.states(queries, upstream, dstate_out.contiguous(), scale, backward=True)
    pairs = call.pairs(queries, keys, call.K, decayed=True, scale=scale)
    dv = call.outputs(keys, upstream, pairs, dstates, 1.0, v.dtype, backward=True)
    crossings = call.crossings(1)
    dq, dk = call.key_gradients(queries, keys, upstream, values, (states, dstates), scale, crossings)
    if log_decay is None:
        ddecay = state.new_empty(0)
    else:
        ddecay = call.decay_gradients(crossings).to(log_decay.dtype).view(log_decay.shape)
    return dq.to(q.dtype).view(q.shape), dk.to(k.dtype).view(k.shape), dv.view(v.shape), ddecay, dstate


@backward.register_fake
def _(q, k, v, log_decay, scale, state, cu_seqlens, do, dstate_out):
    inputs = (q, k, v, state.new_empty(0) if log_decay is None else log_decay, state)
    return tuple(x.new_empty(x.shape) for x in inputs)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What :func:`differentiate` needs."""
    q, k, v, log_decay, ctx.scale, state, ctx.cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, log_decay, state)


def differentiate(ctx: Any, do: Tensor, dstate_out: Tensor) -> tuple[Tensor | None, ...]:
    """The autograd formula, for whichever kernel computed the forward pass."""
    q, k, v, log_decay, state = ctx.saved_tensors
    dq, dk, dv, ddecay, dstate = backward(q, k, v, log_decay, ctx.scale, state, ctx.cu_seqlens, do, dstate_out)
    return dq, dk, dv, None if log_decay is None else ddecay, None, dstate, None


forward.register_autograd(differentiate, setup_context=save)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, gpu.stepwise(log_decay, v), float(scale), state, offsets)
