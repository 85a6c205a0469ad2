"""The compiled CPU kernel (``csrc/cpu/delta_rule.cpp``): chunks of 64 tokens, a single token in two passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.ops.chunked.recurrence import recurrence_operator, stepwise
from seqarch.ops.delta_rule import chunk_torch
from seqarch.ops.delta_rule.inputs import DeltaRuleInputs
from seqarch.ops.native import cpu_library
from seqarch.ops.native.custom_op import Upstream, empty_gradients
from seqarch.ops.native.huge_pages import like

_forward = cpu_library.Kernel("delta_rule_forward", "delta_rule_inputs", "delta_rule_outputs")
_backward = cpu_library.Kernel("delta_rule_backward", "delta_rule_inputs", "delta_rule_gradients")

unavailable = cpu_library.unavailable


def unsupported(inputs: DeltaRuleInputs) -> str | None:
    return None if inputs.device.type == "cpu" else f"q is on {inputs.device}, expected cpu"


def _fields(inputs: DeltaRuleInputs) -> dict[str, Any]:
    """``seqarch_delta_rule_inputs``, copied where the last dimension is strided."""
    fields = cpu_library.recurrence_fields(inputs)
    fields["beta"] = inputs.beta
    fields["read"] = None if inputs.read is None else cpu_library.rows(inputs.read)
    fields["erase"] = None if inputs.erase is None else cpu_library.rows(inputs.erase)
    return fields


def forward(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    """Of ``q, k, v, read, erase`` in one dtype, ``beta``, ``log_decay`` and ``state`` in that of sums."""
    o, state_out = like(inputs.v), like(inputs.state)
    _forward(_fields(inputs), {"o": o, "state_out": state_out})
    return o, state_out


def backward(inputs: DeltaRuleInputs, upstream: Upstream) -> list[Tensor]:
    gradients, (do, dstate_out) = empty_gradients(inputs), upstream.gradients
    names = "dq", "dk", "dv", "dbeta", "dlog_decay", "dread", "derase", "dstate"
    above = {"dout": cpu_library.rows(do), "dstate_out": dstate_out.contiguous()}
    _backward(_fields(inputs), above | dict(zip(names, gradients, strict=True)))
    return gradients


operator = recurrence_operator("delta_rule", DeltaRuleInputs, forward, backward, chunk_torch.run, "cpu")


def run(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    q, k, v, state, log_decay = inputs.q, inputs.k, inputs.v, inputs.state, inputs.log_decay
    read, erase = inputs.read, inputs.erase
    dtype = cpu_library.activation_dtype(state, q, k, v, *(each for each in (read, erase) if each is not None))
    if log_decay is not None:
        log_decay = stepwise(log_decay.to(state.dtype), v)
    read, erase = (None if each is None else each.to(dtype) for each in (read, erase))
    narrow = inputs.replace(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), beta=inputs.beta.to(state.dtype),
                            log_decay=log_decay, read=read, erase=erase)  # fmt: skip
    o, state = operator(narrow)
    return o.to(v.dtype), state
