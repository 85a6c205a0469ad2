"""A Triton kernel token by token, for generation: one launch, the state in registers. Backward runs in chunks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqarch.ops.chunked.recurrence import differentiable
from seqarch.ops.linear_attention import chunk_torch, chunk_triton
from seqarch.ops.triton import availability

unavailable, refuse = chunk_triton.unavailable, chunk_triton.refuse


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
    from seqarch.ops.triton.recurrence import steps

    return steps(q, k, v, None, log_decay, None, scale, state, cu_seqlens)


recur = differentiable(
    "linear_attention_triton_steps", forward, chunk_triton.backward, chunk_torch.run, ("cpu", "cuda")
)


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
