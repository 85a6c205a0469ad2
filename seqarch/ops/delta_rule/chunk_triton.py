"""Triton kernels in chunks of 64 tokens, in the WY form (Yang et al. 2024, "Parallelizing Linear Transformers", section
3), one family for every kind of decay.

With ``u`` the corrected values of a chunk, queries see ``o = pairs(q, k) u + from_start(q) S``. Backward, with ``du``
their gradient, ``y = (I + M)^-T du`` and ``z = -beta y``: z is to ``read`` what the outputs' gradient is to q, so that
one kernel differentiates both, and the gradient of v is ``-z``. Forward keeps nothing; products are as in
``linear_attention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from seqarch.ops.chunked.recurrence import as_given, differentiable
from seqarch.ops.delta_rule import chunk_torch
from seqarch.ops.triton import availability

unavailable = availability.unavailable


def refuse(
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
) -> str | None:
    if erase is not None:
        return "erase is given, expected None: what is removed is removed at k"
    return availability.refuse_recurrence(q, v, state)


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
    from seqarch.ops.delta_rule.launches_triton import DeltaRule

    call = DeltaRule(q, k, v, beta, log_decay, read, state, cu_seqlens)
    o, last = call.forward(state.contiguous(), scale, v.dtype)
    return o.view(v.shape), last


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    read: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Sequence[int] | None,
    do: Tensor,
    dstate_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from seqarch.ops.delta_rule.launches_triton import DeltaRule
    from seqarch.ops.triton.launch import rows

    call = DeltaRule(q, k, v, beta, log_decay, read, state, cu_seqlens)
    found = call.differentiate(rows(do), dstate_out.contiguous(), state.contiguous(), scale)
    return as_given((q, k, v, beta, log_decay, read, state), found)


def plain(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, read: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    """As :func:`chunk_torch.plain`, without ``erase``: of scale, state and cu_seqlens besides."""
    return chunk_torch.plain(q, k, v, beta, log_decay, read, None, *others)


recur = differentiable("delta_rule_triton", forward, backward, plain, ("cpu", "cuda"))


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
