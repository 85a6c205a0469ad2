"""Triton kernels in chunks of 64 tokens (Yang et al. 2023, section 4), one family for every kind of decay.

Forward keeps nothing; backward computes the states before chunks again. Products of bfloat16 activations are bfloat16
with float32 sums; those of float16 and float32 ones are TF32, three products for one where float32 is asked to be
exact (``torch.set_float32_matmul_precision("highest")``, torch's default).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqarch.ops.chunked.recurrence import as_given, differentiable
from seqarch.ops.linear_attention import chunk_torch
from seqarch.ops.triton import availability

unavailable = availability.unavailable


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> str | None:
    return availability.refuse_recurrence(q, v, state)


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
    from seqarch.ops.triton.launch import rows
    from seqarch.ops.triton.recurrence import Recurrence

    call = Recurrence(k, v, (q, k, v), log_decay, state, cu_seqlens)
    queries, keys, values = rows(q), rows(k), rows(v)
    pairs = call.pairs(queries, keys, call.K, decayed=True, scale=scale)
    states, last = call.states(keys, values, state.contiguous(), 1.0, backward=False)
    o = call.outputs(queries, values, pairs, states, scale, v.dtype)
    return o.view(v.shape), last


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
    from seqarch.ops.triton.launch import rows
    from seqarch.ops.triton.recurrence import Recurrence

    call = Recurrence(k, v, (q, k, v), log_decay, state, cu_seqlens)
    queries, keys, values, upstream = rows(q), rows(k), rows(v), rows(do)
    states, _ = call.states(keys, values, state.contiguous(), 1.0, backward=False)
    dstates, dstate = call.states(queries, upstream, dstate_out.contiguous(), scale, backward=True)
    pairs = call.pairs(queries, keys, call.K, decayed=True, scale=scale)
    dv = call.outputs(keys, upstream, pairs, dstates, 1.0, v.dtype, backward=True)
    crossings = call.crossings(1)
    dq, dk = call.key_gradients(queries, keys, upstream, values, (states, dstates), scale, crossings)
    ddecay = None if log_decay is None else call.decay_gradients(crossings)
    return as_given((q, k, v, log_decay, state), (dq, dk, dv, ddecay, dstate))


recur = differentiable("linear_attention_triton", forward, backward, chunk_torch.run, ("cpu", "cuda"))


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    return recur(q, k, v, availability.stepwise(log_decay, v), float(scale), state, offsets)
