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

from torch import Tensor

from seqarch.ops.causal_conv1d import parallel_causal_conv1d, parallel_cpp, parallel_cuda, parallel_torch
from seqarch.ops.causal_conv1d.inputs import CausalConv1dInputs
from seqarch.ops.dispatch.checks import (
    accumulation_dtype,
    floating_on_one_device,
    initial_state,
    match_shapes,
    sequence_offsets,
    unknown_name,
)
from seqarch.ops.dispatch.op import Op

NAME = "causal_conv1d"
WIDTHS = range(2, 9)
ACTIVATIONS = ("silu",)


OP = Op(
    NAME,
    order=(parallel_cpp, parallel_cuda, parallel_torch),
    reference=parallel_torch,
    opt_in=(parallel_causal_conv1d,),
)


@OP.public
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
        cu_seqlens: ``[sequences + 1]`` offsets of sequences packed into B = 1; ``state`` then has one row per sequence.
        backend: a name, or ``"auto"``.

    Returns:
        ``y`` like ``x``, and the state after the last token, in the dtype of ``x``.

    Raises:
        ValueError: shapes disagree, the width or the activation is not served, or ``cu_seqlens`` is malformed.
        TypeError: an input is not floating point.
        BackendError: the named backend cannot serve the call.
    """
    sizes = match_shapes(NAME, x=(x, "B T D"), weight=(weight, "D W"), bias=(bias, "D"))
    floating_on_one_device(NAME, x=x, weight=weight, bias=bias, state=state)
    if sizes["W"] not in WIDTHS:
        raise ValueError(f"{NAME}: weight has width {sizes['W']}, expected {WIDTHS.start} to {WIDTHS.stop - 1}")
    if activation is not None and activation not in ACTIVATIONS:
        raise unknown_name(f"activation of {NAME}", activation, [*ACTIVATIONS, "None"])
    offsets = sequence_offsets(NAME, cu_seqlens, sizes["B"], sizes["T"])
    rows = sizes["B"] if offsets is None else len(offsets) - 1
    if state is not None:
        state = initial_state(NAME, state, (rows, sizes["W"] - 1, sizes["D"]), x.dtype, x.device)
    dtype = accumulation_dtype(x, weight, bias, state)
    bias = None if bias is None else bias.to(dtype)
    return OP(backend, CausalConv1dInputs(x, weight.to(dtype), bias, state, activation == "silu", offsets))


def flops(length: int, channels: int, width: int, batch_size: int = 1) -> int:
    """FLOPs of the forward pass: two a multiply-add of the convolution."""
    return 2 * batch_size * length * channels * width
