"""Triton kernels in chunks of 64 tokens, in the WY form (Yang et al. 2024, "Parallelizing Linear Transformers", section
3), one family for every kind of decay.

With ``u`` the corrected values of a chunk, queries see ``o = scores(q, k) u + from_start(q) S``. Backward, with ``du``
their gradient, ``y = (I + M)^-T du`` and ``z = -beta y``: z is to ``read`` what the outputs' gradient is to q, so that
one kernel differentiates both, and the gradient of v is ``-z``. Forward keeps nothing; products are as in
``linear_attention``.
"""

from __future__ import annotations

from torch import Tensor

from seqarch.ops.chunked.recurrence import recurrence_operator, stepwise
from seqarch.ops.delta_rule import chunk_torch
from seqarch.ops.delta_rule.inputs import DeltaRuleInputs
from seqarch.ops.native.custom_op import Upstream, as_given
from seqarch.ops.triton import availability

unavailable = availability.unavailable


def unsupported(inputs: DeltaRuleInputs) -> str | None:
    if inputs.erase is not None:
        return "erase is given, expected None: what is removed is removed at k"
    return availability.unsupported_recurrence(inputs.q, inputs.v, inputs.state)


def forward(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    """``log_decay`` ``[B, T, H]`` or ``[B, T, H, K]``, ``state`` in the dtype of sums."""
    from seqarch.ops.delta_rule.launches_triton import DeltaRule

    o, last = DeltaRule(inputs).forward(inputs.state.contiguous(), inputs.scale, inputs.v.dtype)
    return o.view(inputs.v.shape), last


def backward(inputs: DeltaRuleInputs, upstream: Upstream) -> list[Tensor]:
    from seqarch.ops.delta_rule.launches_triton import DeltaRule
    from seqarch.ops.triton.launch import rows

    do, dstate_out = upstream.gradients
    *found, dread, dstate = DeltaRule(inputs).differentiate(
        rows(do), dstate_out.contiguous(), inputs.state.contiguous(), inputs.scale
    )
    return as_given(inputs, (*found, dread, None, dstate))


operator = recurrence_operator(
    "delta_rule_triton", DeltaRuleInputs, forward, backward, chunk_torch.run, ("cpu", "cuda")
)


def run(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    return operator(inputs.replace(log_decay=stepwise(inputs.log_decay, inputs.v)))
