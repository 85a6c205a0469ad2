"""Triton kernels (Dao 2023, "FlashAttention-2"): tiles of queries walk over the keys that they see, and no others.

Windows, packed sequences, rows of different lengths and heads that share keys are part of the kernels: nothing is
masked beforehand, copied or repeated. Of few queries, as of a token that is generated, programs share out the keys.
Products of 16-bit inputs are 16-bit with float32 sums; those of float32 ones are TF32, three products for one where
float32 is asked to be exact (``torch.set_float32_matmul_precision("highest")``, torch's default). Each gradient is
added up by one program, in an order that does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from seqarch.ops.attention import operators
from seqarch.ops.dispatch.checks import promoted_dtype
from seqarch.ops.triton import availability

unavailable = availability.unavailable


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
    return availability.refuse_attention(q, k, v)


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
    masked = window is not None or key_start is not None or (causal and q.shape[1] not in (1, k.shape[1]))
    if masked or (offsets is not None and len(offsets) > 2):
        return None
    return "queries see whole sequences, for which torch has kernels of its own"


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
    from seqarch.ops.attention.launches_triton import Attention

    return Attention(q, k, v, causal, window, scale, key_start, cu_seqlens).forward()


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
    from seqarch.ops.attention.launches_triton import Attention

    call = Attention(q, k, v, causal, window, scale, key_start, cu_seqlens)
    return call.differentiate(o.contiguous(), log_sum.contiguous(), do)


attend = operators.differentiable("attention_triton", forward, backward, ("cpu", "cuda"))
run = partial(operators.run, attend, promoted_dtype)
