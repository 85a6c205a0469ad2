"""A Triton kernel token by token, for generation: one launch, the state in registers. Backward runs in chunks."""

from __future__ import annotations

from torch import Tensor

from seqarch.ops.chunked.recurrence import recurrence_operator, stepwise
from seqarch.ops.delta_rule import chunk_torch, chunk_triton
from seqarch.ops.delta_rule.inputs import DeltaRuleInputs

unavailable, unsupported = chunk_triton.unavailable, chunk_triton.unsupported


def forward(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    """``log_decay`` ``[B, T, H]`` or ``[B, T, H, K]``, ``state`` in the dtype of sums."""
    from seqarch.ops.triton.recurrence import steps

    return steps(inputs, inputs.beta, inputs.read)


operator = recurrence_operator(
    "delta_rule_triton_steps", DeltaRuleInputs, forward, chunk_triton.backward, chunk_torch.run, ("cpu", "cuda")
)


def run(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    return operator(inputs.replace(log_decay=stepwise(inputs.log_decay, inputs.v)))
