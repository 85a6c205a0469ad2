"""The compiled CPU kernel (``csrc/cpu/log_linear_attention.cpp``): chunks of 64 tokens, a counter of states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.ops.chunked.recurrence import recurrence_operator
from seqarch.ops.log_linear_attention import chunk_torch
from seqarch.ops.log_linear_attention.inputs import LogLinearAttentionInputs
from seqarch.ops.native import cpu_library
from seqarch.ops.native.custom_op import Upstream, empty_gradients
from seqarch.ops.native.huge_pages import like

_forward = cpu_library.Kernel(
    "log_linear_attention_forward", "log_linear_attention_inputs", "log_linear_attention_outputs"
)
_backward = cpu_library.Kernel(
    "log_linear_attention_backward", "log_linear_attention_inputs", "log_linear_attention_gradients"
)

unavailable = cpu_library.unavailable


def unsupported(inputs: LogLinearAttentionInputs) -> str | None:
    return None if inputs.device.type == "cpu" else f"q is on {inputs.device}, expected cpu"


def _fields(inputs: LogLinearAttentionInputs) -> dict[str, Any]:
    """``seqarch_log_linear_attention_inputs``, copied where the last dimension is strided."""
    q, v, weight, state = inputs.q, inputs.v, inputs.level_weight, inputs.state
    return {
        "dtype": cpu_library.DTYPES[v.dtype],
        "q": cpu_library.rows(q),
        "k": cpu_library.rows(inputs.k),
        "v": cpu_library.rows(v),
        "level_weight": cpu_library.rows(weight),
        "beta": inputs.beta,
        "log_decay": inputs.log_decay,
        "scale": inputs.scale,
        "state": state.contiguous(),
        "before": inputs.before,
        "offsets": inputs.offsets,
        "sequences": state.shape[0],
        "length": q.shape[1],
        "groups": q.shape[2],
        "heads": v.shape[2],
        "keys": q.shape[3],
        "values": v.shape[3],
        "levels": weight.shape[3],
    }


def forward(inputs: LogLinearAttentionInputs) -> tuple[Tensor, Tensor]:
    """Of ``q, k, v`` in one dtype, all else in that of sums."""
    o, state_out = like(inputs.v), like(inputs.state)
    _forward(_fields(inputs), {"o": o, "state_out": state_out})
    return o, state_out


def backward(inputs: LogLinearAttentionInputs, upstream: Upstream) -> list[Tensor]:
    gradients, (do, dstate_out) = empty_gradients(inputs), upstream.gradients
    names = "dq", "dk", "dv", "dlevel_weight", "dbeta", "dlog_decay", "dstate"
    above = {"dout": cpu_library.rows(do), "dstate_out": dstate_out.contiguous()}
    _backward(_fields(inputs), above | dict(zip(names, gradients, strict=True)))
    return gradients


operator = recurrence_operator(
    "log_linear_attention", LogLinearAttentionInputs, forward, backward, chunk_torch.run, "cpu"
)


def run(inputs: LogLinearAttentionInputs) -> tuple[Tensor, Tensor]:
    q, k, v, state = inputs.q, inputs.k, inputs.v, inputs.state
    dtype = cpu_library.activation_dtype(state, q, k, v)
    weight, beta, log_decay = (
        None if each is None else each.to(state.dtype) for each in (inputs.level_weight, inputs.beta, inputs.log_decay)
    )
    given = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    o, state = operator(inputs.replace(**given, level_weight=weight, beta=beta, log_decay=log_decay))
    return o.to(v.dtype), state
