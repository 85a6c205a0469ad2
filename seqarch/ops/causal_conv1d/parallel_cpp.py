"""The compiled CPU kernel (``csrc/cpu/causal_conv1d.cpp``) as a custom operator, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.common import native
from seqarch.ops.common.native import int32, int64, offsets, pointer

unavailable = native.unavailable

_PROBLEM = (offsets, int64, int64, int64, int64, int32)
_X = (int32, pointer, int64, int64, pointer, pointer, pointer)
_forward = native.Kernel("causal_conv1d_forward", *_X, pointer, pointer, *_PROBLEM)
_backward = native.Kernel(
    "causal_conv1d_backward", *_X, pointer, int64, int64, pointer, pointer, pointer, pointer, pointer, *_PROBLEM
)


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
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] <= 1 else tensor.contiguous()


def _problem(x: Tensor, weight: Tensor, silu: bool, cu_seqlens: Sequence[int] | None) -> tuple[Any, ...]:
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return cu_seqlens, sequences, x.shape[1], x.shape[2], weight.shape[1], silu


def _new_state(x: Tensor, weight: Tensor, cu_seqlens: Sequence[int] | None) -> Tensor:
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return x.new_empty(sequences, weight.shape[1] - 1, x.shape[2])


@torch.library.custom_op("seqarch::causal_conv1d", mutates_args=(), device_types="cpu")
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool, cu_seqlens: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    rows, weight = _rows(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    state = None if state is None else state.contiguous()
    y, state_out = torch.empty_like(x, memory_format=torch.contiguous_format), _new_state(x, weight, cu_seqlens)
    inputs = native.DTYPES[x.dtype], rows, rows.stride(0), rows.stride(1), weight, bias, state
    _forward(*inputs, y, state_out, *_problem(x, weight, silu, cu_seqlens))
    return y, state_out


@forward.register_fake
def _(x, weight, bias, state, silu, cu_seqlens):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _new_state(x, weight, cu_seqlens)


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
    """The gradients of x, weight, bias and state; the last two also where there is no bias or state."""
    rows, dy, weight, dstate_out = _rows(x), _rows(dy), weight.contiguous(), dstate_out.contiguous()
    bias = None if bias is None else bias.contiguous()
    state = None if state is None else state.contiguous()
    outputs = _gradients(x, weight, cu_seqlens)
    inputs = native.DTYPES[x.dtype], rows, rows.stride(0), rows.stride(1), weight, bias, state
    upstream = dy, dy.stride(0), dy.stride(1), dstate_out
    _backward(*inputs, *upstream, *outputs, *_problem(x, weight, silu, cu_seqlens))
    return outputs


def _gradients(x: Tensor, weight: Tensor, cu_seqlens: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return dx, dweight, weight.new_empty(weight.shape[0]), _new_state(x, weight, cu_seqlens)


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
