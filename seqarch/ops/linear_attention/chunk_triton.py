"""Triton kernels in chunks of 64 tokens (Yang et al. 2023, section 4), one family for every kind of decay.

Forward keeps nothing; backward computes the states before chunks again. Products of bfloat16 activations are bfloat16
with float32 sums; those of float16 and float32 ones are TF32, three products for one where float32 is asked to be
exact (``torch.set_float32_matmul_precision("highest")``, torch's default).
"""

from __future__ import annotations

from torch import Tensor

from seqarch.ops.chunked.recurrence import recurrence_operator, stepwise
from seqarch.ops.linear_attention import chunk_torch
from seqarch.ops.linear_attention.inputs import LinearAttentionInputs
from seqarch.ops.native.custom_op import Upstream, as_given
from seqarch.ops.triton import availability

unavailable = availability.unavailable


def unsupported(inputs: LinearAttentionInputs) -> str | None:
    return availability.unsupported_recurrence(inputs.q, inputs.v, inputs.state)


def forward(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    """``log_decay`` ``[B, T, H]`` or ``[B, T, H, K]``, ``state`` in the dtype of sums."""
    from seqarch.ops.triton.launch import rows
    from seqarch.ops.triton.recurrence import Recurrence

    q, k, v = inputs.q, inputs.k, inputs.v
    call = Recurrence(inputs, (q, k, v))
    queries, keys, values = rows(q), rows(k), rows(v)
    scores = call.scores(queries, keys, call.K, decayed=True, scale=inputs.scale)
    states, last = call.states(keys, values, inputs.state.contiguous(), 1.0, backward=False)
    o = call.outputs(queries, values, scores, states, inputs.scale, v.dtype)
    return o.view(v.shape), last


def backward(inputs: LinearAttentionInputs, upstream: Upstream) -> list[Tensor]:
    from seqarch.ops.triton.launch import rows
    from seqarch.ops.triton.recurrence import Recurrence

    q, k, v, scale = inputs.q, inputs.k, inputs.v, inputs.scale
    do, dstate_out = upstream.gradients
    call = Recurrence(inputs, (q, k, v))
    queries, keys, values, dout = rows(q), rows(k), rows(v), rows(do)
    states, _ = call.states(keys, values, inputs.state.contiguous(), 1.0, backward=False)
    dstates, dstate = call.states(queries, dout, dstate_out.contiguous(), scale, backward=True)
    scores = call.scores(queries, keys, call.K, decayed=True, scale=scale)
    dv = call.outputs(keys, dout, scores, dstates, 1.0, v.dtype, backward=True)
    decay_terms = call.decay_terms(1)
    dq, dk = call.key_gradients(queries, keys, dout, values, (states, dstates), scale, decay_terms)
    ddecay = None if inputs.log_decay is None else call.decay_gradients(decay_terms)
    return as_given(inputs, (dq, dk, dv, ddecay, dstate))


operator = recurrence_operator(
    "linear_attention_triton", LinearAttentionInputs, forward, backward, chunk_torch.run, ("cpu", "cuda")
)


def run(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    return operator(inputs.replace(log_decay=stepwise(inputs.log_decay, inputs.v)))
