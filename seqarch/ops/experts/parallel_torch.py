"""The reference: expert after expert, each on the tokens that chose it."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.dispatch.eager import is_batched
from seqarch.ops.experts.groups import check_range
from seqarch.ops.experts.inputs import ExpertsInputs

TRANSFORMABLE = True


def run(inputs: ExpertsInputs) -> Tensor:
    y = (_every_expert if is_batched(inputs.expert_index) else _chosen_experts)(inputs.flat())
    return y.to(inputs.x.dtype).reshape(inputs.x.shape)


def _chosen_experts(inputs: ExpertsInputs) -> Tensor:
    index, experts = inputs.expert_index, inputs.w_in.shape[0]
    if index.numel():
        lowest, highest = torch.stack(index.aminmax()).tolist()
        check_range(lowest, highest, experts)
    tokens, weight = _wide(inputs)
    y = torch.zeros_like(tokens)
    for expert in range(experts):
        token, choice = torch.where(index == expert)
        y = y.index_add(0, token, weight[token, choice, None] * _mlp(inputs, expert, tokens[token]))
    return y


def _every_expert(inputs: ExpertsInputs) -> Tensor:
    """Each expert on all tokens: under ``vmap``, nobody can ask which tokens chose it."""
    tokens, weight = _wide(inputs)
    y = torch.zeros_like(tokens)
    for expert in range(inputs.w_in.shape[0]):
        share = weight.where(inputs.expert_index == expert, 0).sum(-1, keepdim=True)
        y = y + share * _mlp(inputs, expert, tokens)
    return y


def _wide(inputs: ExpertsInputs) -> tuple[Tensor, Tensor]:
    """x and the experts' weights of each token in the dtype of sums."""
    wide = accumulation_dtype(inputs.x, inputs.w_in, inputs.w_out, inputs.expert_weight)
    return inputs.x.to(wide), inputs.expert_weight.to(wide)


def _mlp(inputs: ExpertsInputs, expert: int, x: Tensor) -> Tensor:
    """``(act(x W_gate) * (x W_in)) W_out``, or ``act(x W_in) W_out`` without a gate."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ weight[expert].to(x.dtype)
        return y if bias is None else y + bias[expert].to(x.dtype)

    value = product(x, inputs.w_in, inputs.b_in)
    gate = None if inputs.w_gate is None else product(x, inputs.w_gate, inputs.b_gate)
    return product(inputs.hidden(value, gate), inputs.w_out, inputs.b_out)
