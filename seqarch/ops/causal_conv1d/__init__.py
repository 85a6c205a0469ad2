"""Causal depthwise convolution over time: the short convolution of Mamba, Gated DeltaNet and others.

With h = [state; x] along time,

    z[t, d] = bias[d] + sum over w of weight[d, w] h[t + w, d],  y = silu(z) or z,  state' = the last W - 1 rows of h

so the last tap meets the token itself. Source: Gu and Dao 2023, "Mamba", section 3.4 (figure 3); the state as in the
``conv_state`` of its release, but W - 1 wide: the oldest of W inputs is never read again.

Shapes: ``x, y: [B, T, D]``, ``weight: [D, W]`` with W in 2..8, ``bias: [D]``, ``state: [B, W - 1, D]``, oldest first.
Time and memory are linear in T: 2 B T D W FLOPs. Sums are float32 (float64 where an input is float64). The state holds
raw inputs, so it has the dtype of ``x`` and no rounding of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from seqarch.ops.dispatch.checks import (
    accumulation_dtype,
    floating_on_one_device,
    initial_state,
    match_shapes,
    sequence_offsets,
    unknown_name,
)
from seqarch.ops.dispatch.op import Op

WIDTHS = range(2, 9)
ACTIVATIONS = ("silu",)


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> tuple[Any, ...]:
    """Check the arguments of :func:`causal_conv1d` and bring them to the form that every backend takes.

    Returns:
        ``x``; ``weight`` and ``bias`` in the accumulation dtype; ``state`` in the dtype of ``x``, a row a sequence, or
        ``None``; whether SiLU follows; the offsets of packed sequences or ``None``.
    """
    name = "causal_conv1d"
    sizes = match_shapes(name, x=(x, "B T D"), weight=(weight, "D W"), bias=(bias, "D"))
    floating_on_one_device(name, x=x, weight=weight, bias=bias, state=state)
    if sizes["W"] not in WIDTHS:
        raise ValueError(f"{name}: weight has width {sizes['W']}, expected {WIDTHS.start} to {WIDTHS.stop - 1}")
    if activation is not None and activation not in ACTIVATIONS:
        raise unknown_name(f"activation of {name}", activation, [*ACTIVATIONS, "None"])
    offsets = sequence_offsets(name, cu_seqlens, sizes["B"], sizes["T"])
    rows = sizes["B"] if offsets is None else len(offsets) - 1
    if state is not None:
        state = initial_state(name, state, (rows, sizes["W"] - 1, sizes["D"]), x.dtype, x.device)
    dtype = accumulation_dtype(x, weight, bias, state)
    bias = None if bias is None else bias.to(dtype)
    return x, weight.to(dtype), bias, state, activation == "silu", offsets


OP = Op(
    "causal_conv1d",
    prepare,
    order=("parallel_cpp", "parallel_cuda", "parallel_torch"),
    reference="parallel_torch",
    named=("parallel_causal_conv1d",),
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution; see the module for the equation.

    Args:
        x: inputs ``[B, T, D]``.
        weight: taps ``[D, W]``, W from 2 to 8; the last one meets the token itself.
        bias: ``[D]``.
        activation: ``"silu"`` or ``None``.
        state: the last W - 1 inputs before ``x``, ``[B, W - 1, D]``, oldest first; ``None`` means zeros.
        cu_seqlens: ``[sequences + 1]`` offsets of sequences packed into B = 1; ``state`` then has a row a sequence.
        backend: a name, or ``"auto"``.

    Returns:
        ``y`` like ``x``, and the state after the last token, in the dtype of ``x``.

    Raises:
        ValueError: shapes disagree, the width or the activation is not served, or ``cu_seqlens`` is malformed.
        TypeError: an input is not floating point.
        BackendError: the named backend cannot serve the call.
    """
    return OP(backend, x, weight, bias, activation=activation, state=state, cu_seqlens=cu_seqlens)


def flops(length: int, channels: int, width: int, batch_size: int = 1) -> int:
    """FLOPs of the forward pass: two a multiply-add of the convolution."""
    return 2 * batch_size * length * channels * width


__all__ = ["OP", "causal_conv1d", "flops", "prepare"]
