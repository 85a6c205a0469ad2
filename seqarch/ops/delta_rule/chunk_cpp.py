"""The compiled CPU kernel (``csrc/cpu/delta_rule.cpp``): chunks of 64 tokens, a single token in two passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.ops.chunked.recurrence import recurrence_operator
from seqarch.ops.delta_rule import chunk_torch
from seqarch.ops.delta_rule.inputs import DeltaRuleInputs
from seqarch.ops.native import cpu_library
from seqarch.ops.native.cpu_library import Heads, Offsets, Pointer, float64, int32, int64
from seqarch.ops.native.custom_op import Upstream, empty_gradients
from seqarch.ops.native.huge_pages import like

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, *[Heads] * 5, int32, Heads, Heads, float64, Pointer)
_PROBLEM = (Offsets, int64, int64, int64, int64, int64, int64)
_forward = cpu_library.Kernel("delta_rule_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = cpu_library.Kernel("delta_rule_backward", *_INPUTS, Heads, *[Pointer] * 9, *_PROBLEM)

unavailable = cpu_library.unavailable


def unsupported(inputs: DeltaRuleInputs) -> str | None:
    return None if inputs.device.type == "cpu" else f"q is on {inputs.device}, expected cpu"


def _arguments(inputs: DeltaRuleInputs) -> tuple[Any, ...]:
    """Of both kernels, up to the state; copied where the last dimension is strided."""
    log_decay, per_key = inputs.log_decay, inputs.log_decay is not None and inputs.log_decay.ndim == 4
    heads = cpu_library.rows(inputs.q), cpu_library.rows(inputs.k), cpu_library.rows(inputs.v)
    decay = cpu_library.rows(log_decay) if log_decay is not None and per_key else log_decay
    apart = (None if each is None else cpu_library.rows(each) for each in (inputs.read, inputs.erase))
    number, state = cpu_library.DTYPES[inputs.v.dtype], inputs.state.contiguous()
    return number, *heads, inputs.beta, decay, per_key, *apart, inputs.scale, state


def _sizes(inputs: DeltaRuleInputs) -> tuple[Any, ...]:
    (_, length, groups, keys), (heads, values) = inputs.q.shape, inputs.v.shape[2:]
    return inputs.offsets, inputs.state.shape[0], length, groups, heads, keys, values


def forward(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    """Of ``q, k, v, read, erase`` in one dtype, ``beta``, ``log_decay`` and ``state`` in that of sums."""
    outputs = like(inputs.v), like(inputs.state)
    _forward(*_arguments(inputs), *outputs, *_sizes(inputs))
    return outputs


def backward(inputs: DeltaRuleInputs, upstream: Upstream) -> list[Tensor]:
    gradients = empty_gradients(inputs)
    do, dstate_out = upstream.gradients
    _backward(*_arguments(inputs), cpu_library.rows(do), dstate_out.contiguous(), *gradients, *_sizes(inputs))
    return gradients


operator = recurrence_operator("delta_rule", DeltaRuleInputs, forward, backward, chunk_torch.run, "cpu")


def run(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    q, k, v, state, log_decay = inputs.q, inputs.k, inputs.v, inputs.state, inputs.log_decay
    read, erase = inputs.read, inputs.erase
    dtype = cpu_library.activation_dtype(state, q, k, v, *(each for each in (read, erase) if each is not None))
    if log_decay is not None:
        log_decay = cpu_library.stepwise(log_decay.to(state.dtype), v)
    read, erase = (None if each is None else each.to(dtype) for each in (read, erase))
    narrow = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "beta": inputs.beta.to(state.dtype)}
    o, state = operator(inputs.replace(**narrow, log_decay=log_decay, read=read, erase=erase))
    return o.to(v.dtype), state
