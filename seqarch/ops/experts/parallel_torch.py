"""The reference: expert after expert, each on the tokens that chose it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqarch.ops.common.checks import accumulation_dtype
from seqarch.ops.experts.groups import check_range


def run(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_gate: Tensor | None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    if expert_index.numel():
        lowest, highest = torch.stack(expert_index.aminmax()).tolist()
        check_range(lowest, highest, w_in.shape[0])
    wide = accumulation_dtype(x, w_in, w_out, expert_weight)
    tokens, weight = x.to(wide), expert_weight.to(wide)
    y = torch.zeros_like(tokens)
    for expert in range(w_in.shape[0]):
        token, choice = torch.where(expert_index == expert)
        rows = tokens[token]
        hidden = rows @ w_in[expert].to(wide)
        hidden = activation(hidden) if w_gate is None else activation(rows @ w_gate[expert].to(wide)) * hidden
        rows = hidden @ w_out[expert].to(wide)
        y = y.index_add(0, token, weight[token, choice, None] * rows)
    return y.to(x.dtype)
