"""Routed experts with weights of 8 or 4 bits, without gradients: of the chosen experts alone the codes are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqarch.ops.experts.activations import ACTIVATIONS, gated_unit
from seqarch.ops.native.quantized_linear import quantized_linear

torch.library.define(
    "seqarch::quantized_experts",
    "(Tensor x, Tensor index, Tensor weight, Tensor[] w_in, Tensor[] w_out, Tensor[] w_gate, Tensor? b_in,"
    " Tensor? b_out, Tensor? b_gate, str activation, float limit, float value_offset) -> Tensor",
)
quantized_experts = torch.ops.seqarch.quantized_experts.default


@torch.library.impl("seqarch::quantized_experts", "CPU")
def _(
    x: Tensor, index: Tensor, weight: Tensor, w_in: Sequence[Tensor], w_out: Sequence[Tensor],
    w_gate: Sequence[Tensor], b_in: Tensor | None, b_out: Tensor | None, b_gate: Tensor | None, activation: str,
    limit: float, value_offset: float,
) -> Tensor:  # fmt: skip
    """As :func:`seqarch.ops.experts` of ``x [N, D]`` in float32; maps are codes and scales, ``w_gate`` may be empty."""
    y = torch.zeros_like(x)

    def affine(rows: Tensor, pair: Sequence[Tensor], bias: Tensor | None, expert: int) -> Tensor:
        codes, scales = pair
        return quantized_linear(rows, codes[expert], scales[expert], None if bias is None else bias[expert])

    for expert in sorted(set(index.flatten().tolist()) - {-1}):
        tokens, choices = (index == expert).nonzero(as_tuple=True)
        rows = x[tokens]
        value = affine(rows, w_in, b_in, expert)
        if w_gate:
            hidden = gated_unit(activation, affine(rows, w_gate, b_gate, expert), value, limit, value_offset)
        else:
            hidden = ACTIVATIONS[activation](value)
        y.index_add_(0, tokens, affine(hidden, w_out, b_out, expert) * weight[tokens, choices, None])
    return y


@torch.library.register_fake("seqarch::quantized_experts")
def _(x, index, weight, w_in, w_out, w_gate, b_in, b_out, b_gate, activation, limit, value_offset):
    return torch.empty_like(x)
