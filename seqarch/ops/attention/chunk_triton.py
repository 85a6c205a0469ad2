"""Triton kernels (Dao 2023, "FlashAttention-2"): tiles of queries walk over the keys that they see, and no others.

Windows, packed sequences, rows of different lengths and heads that share keys are part of the kernels: nothing is
masked beforehand, copied or repeated. Products of 16-bit inputs are 16-bit with float32 sums; those of float32 ones are
TF32, three products for one where float32 is asked to be exact (``torch.set_float32_matmul_precision("highest")``,
torch's default). Each gradient is added up by one program, in an order that does not change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqarch.ops.attention import gradient
from seqarch.ops.common import gpu
from seqarch.ops.common.checks import accumulation_dtype, promoted_dtype

unavailable = gpu.unavailable


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
    return gpu.refuse_attention(q, k, v)


def yields(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> str | None:
    masked = window is not None or key_start is not None or (causal and q.shape[1] != k.shape[1])
    if masked or (offsets is not None and len(offsets) > 2):
        return None
    return "queries see whole sequences, for which torch has kernels of its own"


@torch.library.custom_op("seqarch::attention_triton", mutates_args=(), device_types=("cpu", "cuda"))
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
    """o, and logarithms of the softmax's sums. ``q, k, v`` of one dtype, ``key_start`` int64, no window: 0."""
    from seqarch.ops.attention.launches_triton import Attention

    return Attention(q, k, v, causal, window, scale, key_start, cu_seqlens).forward()


@forward.register_fake
def _(q, k, v, causal, window, scale, key_start, cu_seqlens):
    return v.new_empty(*q.shape[:3], v.shape[3]), v.new_empty(q.shape[:3], dtype=accumulation_dtype(v))


@torch.library.custom_op("seqarch::attention_triton_backward", mutates_args=(), device_types=("cpu", "cuda"))
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
    from seqarch.ops.attention.launches_triton import Attention

    call = Attention(q, k, v, causal, window, scale, key_start, cu_seqlens)
    return call.differentiate(o.contiguous(), log_sum.contiguous(), do)


@backward.register_fake
def _(q, k, v, causal, window, scale, key_start, cu_seqlens, o, log_sum, do):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


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
    dtype = promoted_dtype(q, k, v)
    start = None if key_start is None else key_start.long()
    return forward(q.to(dtype), k.to(dtype), v.to(dtype), causal, window or 0, scale, start, offsets)[0].to(v.dtype)
