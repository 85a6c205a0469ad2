"""The compiled CPU kernel (``csrc/cpu/linear_attention.cpp``): chunks of 64 tokens, one token in a single pass."""

from __future__ import annotations

from torch import Tensor

from seqarch.ops.chunked.recurrence import recurrence_operator, stepwise
from seqarch.ops.linear_attention import chunk_torch
from seqarch.ops.linear_attention.inputs import LinearAttentionInputs
from seqarch.ops.native import cpu_library
from seqarch.ops.native.custom_op import Upstream, empty_gradients
from seqarch.ops.native.huge_pages import like

_forward = cpu_library.Kernel("linear_attention_forward", "linear_attention_inputs", "linear_attention_outputs")
_backward = cpu_library.Kernel("linear_attention_backward", "linear_attention_inputs", "linear_attention_gradients")

unavailable = cpu_library.unavailable


def unsupported(inputs: LinearAttentionInputs) -> str | None:
    return None if inputs.device.type == "cpu" else f"q is on {inputs.device}, expected cpu"


def forward(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    """Of ``q, k, v`` in one dtype, ``log_decay`` and ``state`` in that of sums."""
    o, state_out = like(inputs.v), like(inputs.state)
    _forward(cpu_library.recurrence_fields(inputs), {"o": o, "state_out": state_out})
    return o, state_out


def backward(inputs: LinearAttentionInputs, upstream: Upstream) -> list[Tensor]:
    gradients, (do, dstate_out) = empty_gradients(inputs), upstream.gradients
    names = "dq", "dk", "dv", "dlog_decay", "dstate"
    above = {"dout": cpu_library.rows(do), "dstate_out": dstate_out.contiguous()}
    _backward(cpu_library.recurrence_fields(inputs), above | dict(zip(names, gradients, strict=True)))
    return gradients


operator = recurrence_operator("linear_attention", LinearAttentionInputs, forward, backward, chunk_torch.run, "cpu")


def run(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    q, k, v, state, log_decay = inputs.q, inputs.k, inputs.v, inputs.state, inputs.log_decay
    dtype = cpu_library.activation_dtype(state, q, k, v)
    if log_decay is not None:
        log_decay = stepwise(log_decay.to(state.dtype), v)
    o, state = operator(inputs.replace(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), log_decay=log_decay))
    return o.to(v.dtype), state
