"""A Triton kernel token by token, for generation: one launch, the state in registers. Backward runs in chunks."""

from __future__ import annotations

from torch import Tensor

from seqarch.ops.chunked.recurrence import recurrence_operator, stepwise
from seqarch.ops.linear_attention import chunk_torch, chunk_triton
from seqarch.ops.linear_attention.inputs import LinearAttentionInputs

unavailable, unsupported = chunk_triton.unavailable, chunk_triton.unsupported


def forward(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    """``log_decay`` ``[B, T, H]`` or ``[B, T, H, K]``, ``state`` in the dtype of sums."""
    from seqarch.ops.triton.recurrence import steps

    return steps(inputs)


operator = recurrence_operator(
    "linear_attention_triton_steps",
    LinearAttentionInputs,
    forward,
    chunk_triton.backward,
    chunk_torch.run,
    ("cpu", "cuda"),
)


def run(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    return operator(inputs.replace(log_decay=stepwise(inputs.log_decay, inputs.v)))
