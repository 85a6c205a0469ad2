"""The reference: one step after the other, as the equation is written."""

from __future__ import annotations

from torch import Tensor

from seqarch.ops.chunked.packing import join_sequences
from seqarch.ops.chunked.recurrence import join_tokens, token_inputs
from seqarch.ops.linear_attention.inputs import LinearAttentionInputs

TRANSFORMABLE = True


def run(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    outputs, states = [], []
    for state, decay, q, k, v in token_inputs(inputs, inputs.q, inputs.k, inputs.v):
        for t in range(q.shape[1]):
            if decay is not None:
                state = decay[:, t] * state
            state = state + k[:, t].mT @ v[:, t]
            outputs.append((inputs.scale * q[:, t]) @ state)
        states.append(state)
    o = join_tokens(outputs, inputs, inputs.q, inputs.k, inputs.v)
    return o.to(inputs.v.dtype), join_sequences(states, dim=0)
