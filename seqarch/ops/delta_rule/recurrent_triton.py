"""A Triton kernel token by token, for generation: one launch, the state in registers. Backward runs in chunks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqarch.ops.chunked.recurrence import differentiable
from seqarch.ops.delta_rule import chunk_triton
from seqarch.ops.triton import availability

unavailable, refuse = chunk_triton.unavailable, chunk_triton.refuse


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    read: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """``log_decay`` ``[B, T, H]`` or ``[B, T, H, K]``, ``read`` ``None`` for k, ``state`` in the dtype of sums."""
    from seqarch.ops.triton.recurrence import steps

    return steps(q, k, v, beta, log_decay, read, scale, state, cu_seqlens)


recur = differentiable("delta_rule_triton_steps", forward, chunk_triton.backward, chunk_triton.plain, ("cpu", "cuda"))


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
    steps = availability.stepwise(log_decay, v)
    return recur(q, k, v, beta, steps, None if read is k else read, float(scale), state, offsets)
