"""Tokens sorted by expert, one group of matrix products an expert, and the sums taken in the tokens' own order.

Every reordering is a permutation, so nothing is added in an order that could differ from run to run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqarch.ops.common.autocast import autocast_is_on
from seqarch.ops.common.checks import accumulation_dtype
from seqarch.ops.experts.groups import grouped_matmul, sort_by_expert


def run(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_gate: Tensor | None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    (tokens, top_k), width = expert_index.shape, x.shape[-1]
    order, starts = sort_by_expert(expert_index.flatten(), w_in.shape[0])
    # Copying each token k times first makes the gather a permutation, whose backward adds no two rows.
    rows = x[:, None].expand(-1, top_k, -1).reshape(-1, width).index_select(0, order)
    dtype = _product_dtype(x)
    rows, w_in, w_out = rows.to(dtype), w_in.to(dtype), w_out.to(dtype)
    hidden = grouped_matmul(rows, w_in, starts)
    if w_gate is None:
        hidden = activation(hidden)
    else:
        hidden = activation(grouped_matmul(rows, w_gate.to(dtype), starts)) * hidden
    outputs = grouped_matmul(hidden, w_out, starts)
    y = torch.empty_like(outputs).index_copy(0, order, outputs).view(tokens, top_k, width)
    wide = accumulation_dtype(y, expert_weight)
    return (y.to(wide) * expert_weight[..., None].to(wide)).sum(dim=1).to(x.dtype)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The products' dtype: x's, or autocast's, which does not see into a custom operator."""
    if x.dtype == torch.float64 or not autocast_is_on(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)
