"""The compiled CPU kernel (``csrc/cpu/selective_scan.cpp``) as a custom operator, forward and backward.

Step size, skip and gate are computed inside it. Channels lie side by side in vectors, so that the sum over a channel's
states needs none within a vector. The backward pass computes a chunk's decays and states again from the state at its
start, in the cache: memory is ``O(T D + T D N / C)``, with gradients alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.common import native
from seqarch.ops.common.native import Offsets, Pointer, Rows, int32, int64

unavailable = native.unavailable

CHUNK = 32
"""C, tokens whose decays and states the backward pass holds at once."""

# The order of the header, csrc/include/seqarch.h.
_PROBLEM = (int32, *[Rows] * 5, *[Pointer] * 3, Offsets, *[int64] * 6, int32, int32)
_forward = native.Kernel("selective_scan_forward", *_PROBLEM, Pointer, Rows, Pointer, Pointer)
_backward = native.Kernel("selective_scan_backward", *_PROBLEM, Pointer, Rows, Pointer, *[Rows] * 5, *[Pointer] * 4)


def refuse(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    scale_input: bool,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, expected cpu"
    for name, tensor in {"x": x, "dt": dt, "B": B, "C": C, "z": z}.items():
        if tensor is not None and tensor.dtype not in native.DTYPES:
            return f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, native.DTYPES))}"
    return None


def run(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    scale_input: bool,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    D, dt_bias = (None if m is None else m.to(state.dtype) for m in (D, dt_bias))
    inputs = x, dt, A.to(state.dtype), B, C, D, z, dt_bias, state
    keep = torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in inputs)
    y, last, _ = scan(*inputs, dt_softplus, scale_input, keep, offsets)
    return y, last


def _problem(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    scale_input: bool,
    cu_seqlens: Sequence[int] | None,
) -> tuple[Any, ...]:
    rows = [None if m is None else _rows(m) for m in (x, dt, B, C, z)]
    parameters = [None if m is None else m.contiguous() for m in (A, D, dt_bias)]
    sizes = _sequences(x, cu_seqlens), *x.shape[1:], A.shape[1], B.shape[2], CHUNK
    return native.DTYPES[A.dtype], *rows, *parameters, cu_seqlens, *sizes, softplus, scale_input


def _rows(m: Tensor) -> Tensor:
    """``[B, T, ...]`` in which a token's elements lie side by side: the tensor itself or a copy."""
    side_by_side = m.stride(-1) == 1 and (m.ndim == 3 or m.stride(2) == m.shape[3])
    return m if side_by_side else m.contiguous()


def _sequences(x: Tensor, cu_seqlens: Sequence[int] | None) -> int:
    return x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def _chunks(x: Tensor, cu_seqlens: Sequence[int] | None) -> int:
    """Chunks of all sequences."""
    if cu_seqlens is None:
        return x.shape[0] * -(-x.shape[1] // CHUNK)
    return sum(-(-(end - start) // CHUNK) for start, end in pairwise(cu_seqlens))


def _like(m: Tensor) -> Tensor:
    return m.new_empty(m.shape)


def _outputs(
    x: Tensor, A: Tensor, state: Tensor, keep: bool, cu_seqlens: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for y, the last state and the state before each chunk."""
    chunks = _chunks(x, cu_seqlens) if keep else 0
    return _like(x), _like(state), state.new_empty(chunks, A.shape[1], A.shape[0])


@torch.library.custom_op("seqarch::selective_scan", mutates_args=(), device_types="cpu")
def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
    scale_input: bool,
    keep: bool,
    cu_seqlens: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and, to ``keep`` for the backward pass, the state before each chunk."""
    y, last, starts = _outputs(x, A, state, keep, cu_seqlens)
    problem = _problem(x, dt, A, B, C, D, z, dt_bias, softplus, scale_input, cu_seqlens)
    _forward(*problem, state.contiguous(), y, last, starts if keep else None)
    return y, last, starts


@scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, state, softplus, scale_input, keep, cu_seqlens):
    return _outputs(x, A, state, keep, cu_seqlens)


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _gradients(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, dlast: Tensor, shared: bool
) -> _Gradients:
    """Room for the gradients of x, dt, A, B, C, D, z, dt_bias and state; empty where there is nothing."""
    dB, dC = (_like(m) if shared else m.new_empty(0) for m in (B, C))
    dz = x.new_empty(0) if z is None else _like(z)
    return _like(x), _like(dt), _like(A), dB, dC, A.new_empty(len(A)), dz, A.new_empty(len(A)), _like(dlast)


@torch.library.custom_op("seqarch::selective_scan_backward", mutates_args=(), device_types="cpu")
def scan_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    starts: Tensor,
    softplus: bool,
    scale_input: bool,
    shared: bool,
    cu_seqlens: Sequence[int] | None,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C, D, z, dt_bias and state; those of B and C only where ``shared``."""
    gradients = _gradients(x, dt, A, B, C, z, dlast, shared)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = gradients
    problem = _problem(x, dt, A, B, C, D, z, dt_bias, softplus, scale_input, cu_seqlens)
    rows = dx, ddt, *((dB, dC) if shared else (None, None)), None if z is None else dz
    _backward(*problem, starts, _rows(dy), dlast.contiguous(), *rows, dA, dD, dbias, dstate)
    return gradients


@scan_backward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, starts, softplus, scale_input, shared, cu_seqlens, dy, dlast):
    return _gradients(x, dt, A, B, C, z, dlast, shared)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _state, ctx.softplus, ctx.scale_input, _, ctx.cu_seqlens = inputs
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(*tensors, output[-1])


def _differentiate(ctx: Any, dy: Tensor, dlast: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, starts = ctx.saved_tensors
    shared = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    options = ctx.softplus, ctx.scale_input, shared, ctx.cu_seqlens
    found = scan_backward(*inputs, starts, *options, dy, dlast)
    gradients = [m if needed else None for m, needed in zip(found, ctx.needs_input_grad, strict=False)]
    return *gradients, None, None, None, None


scan.register_autograd(_differentiate, setup_context=_save)
