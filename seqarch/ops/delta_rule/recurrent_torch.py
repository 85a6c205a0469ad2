"""The reference: one step after the other, as the equation is written."""

from __future__ import annotations

from torch import Tensor

from seqarch.ops.chunked.packing import join_sequences
from seqarch.ops.chunked.recurrence import join_tokens, token_inputs
from seqarch.ops.delta_rule.inputs import DeltaRuleInputs

TRANSFORMABLE = True


def run(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    reads = inputs.k if inputs.read is None else inputs.read
    erases = inputs.k if inputs.erase is None else inputs.erase
    tensors = inputs.q, inputs.k, inputs.v, inputs.beta.unsqueeze(-1), reads, erases
    outputs, states = [], []
    for state, decay, q, k, v, beta, read, erase in token_inputs(inputs, *tensors):
        for t in range(q.shape[1]):
            if decay is not None:
                state = decay[:, t] * state
            old = read[:, t] @ state
            if inputs.erase is None:
                state = state + k[:, t].mT @ (beta[:, t] * (v[:, t] - old))
            else:
                state = state + k[:, t].mT @ (beta[:, t] * v[:, t]) - erase[:, t].mT @ (beta[:, t] * old)
            outputs.append((inputs.scale * q[:, t]) @ state)
        states.append(state)
    o = join_tokens(outputs, inputs, *tensors)
    return o.to(inputs.v.dtype), join_sequences(states, dim=0)
