"""The reference: expert after expert, each on the tokens that chose it."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.dispatch.eager import is_batched
from seqarch.ops.experts.activations import ACTIVATIONS
from seqarch.ops.experts.groups import check_range

TRANSFORMABLE = True


def run(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_gate: Tensor | None,
    activation: str,
) -> Tensor:
    if is_batched(expert_index):
        return _every_expert(x, w_in, w_out, expert_index, expert_weight, w_gate, activation)
    if expert_index.numel():
        lowest, highest = torch.stack(expert_index.aminmax()).tolist()
        check_range(lowest, highest, w_in.shape[0])
    wide = accumulation_dtype(x, w_in, w_out, expert_weight)
    tokens, weight, act = x.to(wide), expert_weight.to(wide), ACTIVATIONS[activation]
    y = torch.zeros_like(tokens)
    for expert in range(w_in.shape[0]):
        token, choice = torch.where(expert_index == expert)
        rows = tokens[token]
        hidden = rows @ w_in[expert].to(wide)
        hidden = act(hidden) if w_gate is None else act(rows @ w_gate[expert].to(wide)) * hidden
        rows = hidden @ w_out[expert].to(wide)
        y = y.index_add(0, token, weight[token, choice, None] * rows)
    return y.to(x.dtype)


def _every_expert(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_gate: Tensor | None,
    activation: str,
) -> Tensor:
    """Each expert on all tokens: under ``vmap``, nobody can ask which tokens chose it."""
    wide = accumulation_dtype(x, w_in, w_out, expert_weight)
    tokens, weight, act = x.to(wide), expert_weight.to(wide), ACTIVATIONS[activation]
    y = torch.zeros_like(tokens)
    for expert in range(w_in.shape[0]):
        hidden = tokens @ w_in[expert].to(wide)
        hidden = act(hidden) if w_gate is None else act(tokens @ w_gate[expert].to(wide)) * hidden
        share = weight.where(expert_index == expert, 0).sum(-1, keepdim=True)
        y = y + share * (hidden @ w_out[expert].to(wide))
    return y.to(x.dtype)
