"""What the compiled and the Triton kernels share: custom operators, of which nothing is kept but inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.common.checks import accumulation_dtype
from seqarch.ops.common.memory import in_huge_pages, like
from seqarch.ops.common.operators import define


def outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for o ``[B, Tq, H, V]`` and the logarithms of the softmax's sums ``[B, Tq, H]``."""
    return in_huge_pages(v.new_empty(*q.shape[:3], v.shape[3])), v.new_empty(q.shape[:3], dtype=accumulation_dtype(v))


def gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for those of q, k and v."""
    return like(q), like(k), like(v)


def differentiable(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], devices: str | Sequence[str]
) -> Callable[..., Any]:
    """The operator ``seqarch::NAME`` for these types of device.

    ``forward(q, k, v, causal, window, scale, key_start, cu_seqlens)`` gives o and the logarithms of the softmax's sums;
    ``q, k, v`` are of one dtype, ``key_start`` int64, and a window of 0 is none. ``backward`` takes the same arguments,
    o, these logarithms and the gradient of o, and gives the gradients of q, k and v.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, ctx.causal, ctx.window, ctx.scale, key_start, ctx.cu_seqlens = inputs
        ctx.save_for_backward(q, k, v, key_start, *output)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, key_start, o, log_sum = ctx.saved_tensors
        if do is None:
            return (None,) * 8
        options = ctx.causal, ctx.window, ctx.scale, key_start, ctx.cu_seqlens
        return *gradient(q, k, v, *options, o, log_sum, do), None, None, None, None, None

    operator, gradient = define(
        name, forward, backward, lambda q, k, v, *_: outputs(q, k, v), lambda q, k, v, *_: gradients(q, k, v), save,
        differentiate, devices,
    )  # fmt: skip
    return operator


def run(
    attend: Callable[..., Any],
    common_dtype: Callable[..., torch.dtype],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> Tensor:
    """What a backend does with the prepared arguments, by its operator, in the dtype that it takes q, k and v in."""
    dtype = common_dtype(q, k, v)
    start = None if key_start is None else key_start.long()
    return attend(q.to(dtype), k.to(dtype), v.to(dtype), causal, window or 0, scale, start, offsets)[0].to(v.dtype)
