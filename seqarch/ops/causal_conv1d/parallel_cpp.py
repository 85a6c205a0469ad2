"""The compiled CPU kernel (``csrc/cpu/causal_conv1d.cpp``) as a custom operator, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.common import native
from seqarch.ops.common.native import Offsets, Pointer, int32, int64

unavailable = native.unavailable

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, Pointer, int64, int64, Pointer, Pointer, Pointer)
_UPSTREAM = (Pointer, int64, int64, Pointer)
_PROBLEM = (Offsets, int64, int64, int64, int64, int32)
_forward = native.Kernel("causal_conv1d_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = native.Kernel("causal_conv1d_backward", *_INPUTS, *_UPSTREAM, Pointer, Pointer, Pointer, Pointer, *_PROBLEM)


def refuse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    offsets: tuple[int, ...] | None,
) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, expected cpu"
    if x.dtype not in native.DTYPES:
        return f"x has dtype {x.dtype}, expected one of {', '.join(map(str, native.DTYPES))}"
    if weight.dtype != torch.float32 and x.dtype != weight.dtype:
        return f"x has dtype {x.dtype} beside {weight.dtype} parameters, expected the same"
    return None


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels lie side by side, else a copy in which they do."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _inputs(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> tuple[Any, ...]:
    x, weight = _rows(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    state = None if state is None else state.contiguous()
    return native.DTYPES[x.dtype], x, x.stride(0), x.stride(1), weight, bias, state


def _sequences(x: Tensor, cu_seqlens: Sequence[int] | None) -> int:
    return x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def _problem(x: Tensor, weight: Tensor, silu: bool, cu_seqlens: Sequence[int] | None) -> tuple[Any, ...]:
    return cu_seqlens, _sequences(x, cu_seqlens), x.shape[1], x.shape[2], weight.shape[1], silu


def _outputs(x: Tensor, weight: Tensor, cu_seqlens: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Room for a tensor like ``x`` and for a state."""
    state = x.new_empty(_sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2])
    return torch.empty_like(x, memory_format=torch.contiguous_format), state


def _gradients(x: Tensor, weight: Tensor, cu_seqlens: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dstate = _outputs(x, weight, cu_seqlens)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return dx, dweight, weight.new_empty(weight.shape[0]), dstate


@torch.library.custom_op("seqarch::causal_conv1d", mutates_args=(), device_types="cpu")
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool, cu_seqlens: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    outputs = _outputs(x, weight, cu_seqlens)
    _forward(*_inputs(x, weight, bias, state), *outputs, *_problem(x, weight, silu, cu_seqlens))
    return outputs


@forward.register_fake
def _(x, weight, bias, state, silu, cu_seqlens):
    return _outputs(x, weight, cu_seqlens)


@torch.library.custom_op("seqarch::causal_conv1d_backward", mutates_args=(), device_types="cpu")
def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    cu_seqlens: Sequence[int] | None,
    dy: Tensor,
    dstate_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and state; of the last two also where there is no bias or state."""
    gradients, dy = _gradients(x, weight, cu_seqlens), _rows(dy)
    upstream = dy, dy.stride(0), dy.stride(1), dstate_out.contiguous()
    inputs = _inputs(x, weight, bias, state)
    _backward(*inputs, *upstream, *gradients, *_problem(x, weight, silu, cu_seqlens))
    return gradients


@backward.register_fake
def _(x, weight, bias, state, silu, cu_seqlens, dy, dstate_out):
    return _gradients(x, weight, cu_seqlens)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, state, ctx.silu, ctx.cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, state)


def _differentiate(ctx: Any, dy: Tensor, dstate_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, state = ctx.saved_tensors
    dx, dweight, dbias, dstate = backward(x, weight, bias, state, ctx.silu, ctx.cu_seqlens, dy, dstate_out)
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None, None


forward.register_autograd(_differentiate, setup_context=_save)

run = forward
