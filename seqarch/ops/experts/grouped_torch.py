"""Tokens sorted by expert, one group of matrix products an expert, and the sums taken in the tokens' own order.

Every reordering is a permutation, so nothing is added in an order that could differ from run to run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqarch.ops.common.checks import accumulation_dtype


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
    chosen = expert_index.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=w_in.shape[0]).tolist()
    # Copying each token k times first makes the gather a permutation, whose backward adds no two rows.
    rows = x[:, None].expand(-1, top_k, -1).reshape(-1, width).index_select(0, order)
    # unbind: its backward stacks the experts' gradients once, where w[e] fills a full-size buffer for each e.
    gates = [None] * len(counts) if w_gate is None else w_gate.unbind()
    groups = list(zip(rows.split(counts), w_in.unbind(), gates, w_out.unbind(), strict=True))
    busy = [group for group in groups if len(group[0])] or groups[:1]  # of no tokens the gradients are zeros
    outputs = torch.cat([_expert(*group, activation) for group in busy])
    y = torch.empty_like(outputs).index_copy(0, order, outputs).view(tokens, top_k, width)
    wide = accumulation_dtype(y, expert_weight)
    return (y.to(wide) * expert_weight[..., None].to(wide)).sum(dim=1).to(x.dtype)


def _expert(
    rows: Tensor, w_in: Tensor, w_gate: Tensor | None, w_out: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    hidden = rows @ w_in.to(rows.dtype)
    hidden = activation(hidden) if w_gate is None else activation(rows @ w_gate.to(rows.dtype)) * hidden
    return hidden @ w_out.to(rows.dtype)
