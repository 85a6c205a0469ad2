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

import torch
from torch import Tensor

from seqarch.ops.common import gpu

unavailable = gpu.unavailable


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
    return gpu.refuse_recurrence(q, v, state)


@torch.library.custom_op("seqarch::delta_rule_triton", mutates_args=(), device_types=("cpu", "cuda"))
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


@forward.register_fake
def _(q, k, v, beta, log_decay, read, scale, state, cu_seqlens):
    return v.new_empty(v.shape), state.new_empty(state.shape)


def _gradients(*inputs: Tensor | None) -> list[Tensor]:
    """Room for the gradient of each; an empty tensor for ``None``."""
    return [torch.empty(0) if each is None else each.new_empty(each.shape) for each in inputs]


@torch.library.custom_op("seqarch::delta_rule_triton_backward", mutates_args=(), device_types=("cpu", "cuda"))
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
) -> list[Tensor]:
    """The gradients of the tensors before ``scale``, empty where there is none, and of ``state``."""
    from seqarch.ops.common.launch_triton import rows
    from seqarch.ops.delta_rule.launches_triton import DeltaRule

    call = DeltaRule(q, k, v, beta, log_decay, read, state, cu_seqlens)
    found = call.differentiate(rows(do), dstate_out.contiguous(), state.contiguous(), scale)
    inputs = (q, k, v, beta, log_decay, read, state)
    return [
        torch.empty(0) if each is None else gradient.to(each.dtype).view(each.shape)
        for each, gradient in zip(inputs, found, strict=True)
    ]


@backward.register_fake
def _(q, k, v, beta, log_decay, read, scale, state, cu_seqlens, do, dstate_out):
    return _gradients(q, k, v, beta, log_decay, read, state)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What :func:`differentiate` needs."""
    *tensors, ctx.scale, state, ctx.cu_seqlens = inputs
    ctx.save_for_backward(*tensors, state)


def differentiate(ctx: Any, do: Tensor, dstate_out: Tensor) -> tuple[Tensor | None, ...]:
    """The autograd formula, for whichever kernel computed the forward pass."""
    *tensors, state = ctx.saved_tensors
    *gradients, dstate = backward(*tensors, ctx.scale, state, ctx.cu_seqlens, do, dstate_out)
    given = [None if each is None else gradient for each, gradient in zip(tensors, gradients, strict=True)]
    return *given, None, dstate, None


forward.register_autograd(differentiate, setup_context=save)


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
    steps = gpu.stepwise(log_decay, v)
    return forward(q, k, v, beta, steps, None if read is k else read, float(scale), state, offsets)
