"""The compiled CPU kernel (``csrc/cpu/linear_attention.cpp``): chunks of 64 tokens, one token in a single pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.ops.chunked.recurrence import recurrence_operator
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


def _fields(inputs: LinearAttentionInputs) -> dict[str, Any]:
    """``seqarch_linear_attention_inputs``, copied where the last dimension is strided."""
    q, v, log_decay, state = inputs.q, inputs.v, inputs.log_decay, inputs.state
    per_key = log_decay is not None and log_decay.ndim == 4
    return {
        "dtype": cpu_library.DTYPES[v.dtype],
        "q": cpu_library.rows(q),
        "k": cpu_library.rows(inputs.k),
        "v": cpu_library.rows(v),
        "log_decay": cpu_library.rows(log_decay) if log_decay is not None and per_key else log_decay,
        "decay_per_key": per_key,
        "scale": inputs.scale,
        "state": state.contiguous(),
        "offsets": inputs.offsets,
        "sequences": state.shape[0],
        "length": q.shape[1],
        "groups": q.shape[2],
        "heads": v.shape[2],
        "keys": q.shape[3],
        "values": v.shape[3],
    }


def forward(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    """Of ``q, k, v`` in one dtype, ``log_decay`` and ``state`` in that of sums."""
    o, state_out = like(inputs.v), like(inputs.state)
    _forward(_fields(inputs), {"o": o, "state_out": state_out})
    return o, state_out


def backward(inputs: LinearAttentionInputs, upstream: Upstream) -> list[Tensor]:
    gradients, (do, dstate_out) = empty_gradients(inputs), upstream.gradients
    names = "dq", "dk", "dv", "dlog_decay", "dstate"
    above = {"dout": cpu_library.rows(do), "dstate_out": dstate_out.contiguous()}
    _backward(_fields(inputs), above | dict(zip(names, gradients, strict=True)))
    return gradients


operator = recurrence_operator("linear_attention", LinearAttentionInputs, forward, backward, chunk_torch.run, "cpu")


def run(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    q, k, v, state, log_decay = inputs.q, inputs.k, inputs.v, inputs.state, inputs.log_decay
    dtype = cpu_library.activation_dtype(state, q, k, v)
    if log_decay is not None:
        log_decay = cpu_library.stepwise(log_decay.to(state.dtype), v)
    o, state = operator(inputs.replace(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), log_decay=log_decay))
    return o.to(v.dtype), state
