"""The autograd formula that the operators of compiled kernels share: nothing is kept but inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def register(forward: Any, backward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Differentiate ``forward(q, k, v, causal, window, scale, key_start, cu_seqlens)``, which returns o and the
    logarithms of the softmax's sums, by ``backward`` of the same arguments, o, these logarithms and the gradient of o.
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
        return *backward(q, k, v, *options, o, log_sum, do), None, None, None, None, None

    forward.register_autograd(differentiate, setup_context=save)
