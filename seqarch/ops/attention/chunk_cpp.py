"""The compiled CPU kernel (``csrc/cpu/attention.cpp``): 64 queries over 64 keys at a time, with an online softmax."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.attention.operators import AttentionOperators, empty_outputs
from seqarch.ops.native import cpu_library
from seqarch.ops.native.custom_op import Upstream, empty_gradients

_forward = cpu_library.Kernel("attention_forward", "attention_inputs", "attention_outputs")
_backward = cpu_library.Kernel("attention_backward", "attention_inputs", "attention_gradients")

unavailable = cpu_library.unavailable


def unsupported(inputs: AttentionInputs) -> str | None:
    if inputs.logit_cap:
        return "logit_cap is given, which the kernel does not know"
    return None if inputs.device.type == "cpu" else f"q is on {inputs.device}, expected cpu"


def _fields(inputs: AttentionInputs) -> dict[str, Any]:
    """``seqarch_attention_inputs``, copied where the last dimension is strided."""
    q, k, v, offsets = inputs.q, inputs.k, inputs.v, inputs.offsets
    return {
        "dtype": cpu_library.DTYPES[v.dtype],
        "q": cpu_library.rows(q),
        "k": cpu_library.rows(k),
        "v": cpu_library.rows(v),
        "causal": inputs.causal,
        "window": inputs.window,
        "scale": inputs.scale,
        "key_start": None if inputs.key_start is None else inputs.key_start.contiguous(),
        "offsets": offsets,
        "key_bias": None if inputs.key_bias is None else inputs.key_bias.contiguous(),
        "sequences": q.shape[0] if offsets is None else len(offsets) - 1,
        "queries": q.shape[1],
        "keys": k.shape[1],
        "groups": k.shape[2],
        "heads": q.shape[2],
        "key_width": q.shape[3],
        "value_width": v.shape[3],
    }


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Logarithms are to base 2."""
    o, log_sum = empty_outputs(inputs)
    _forward(_fields(inputs), {"o": o, "log_sum": log_sum})
    return o, log_sum


def backward(inputs: AttentionInputs, upstream: Upstream) -> list[Tensor]:
    (o, log_sum), (do, *dlse) = upstream.kept, upstream.gradients
    dq, dk, dv, none, dbias = empty_gradients(inputs)
    outputs: dict[str, Any] = {"o": cpu_library.rows(o), "dout": cpu_library.rows(do)}
    outputs |= {"log_sum": log_sum.contiguous(), "dlse": dlse[0].div(math.log(2)).contiguous() if dlse else None}
    wanted = None if inputs.key_bias is None else dbias
    _backward(_fields(inputs), outputs | {"dq": dq, "dk": dk, "dv": dv, "dkey_bias": wanted})
    return [dq, dk, dv, none, dbias]


operators = AttentionOperators("attention", forward, backward, "cpu", unit=math.log(2))


def run(inputs: AttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    return operators(inputs, cpu_library.common_dtype(inputs.q, inputs.k, inputs.v))
