"""The compiled CPU kernel (``csrc/cpu/linear_attention.cpp``): chunks of 64 tokens, one token in a single pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.ops.chunked.recurrence import recurrence_operator
from seqarch.ops.linear_attention import chunk_torch
from seqarch.ops.linear_attention.inputs import LinearAttentionInputs
from seqarch.ops.native import cpu_library
from seqarch.ops.native.cpu_library import Heads, Offsets, Pointer, float64, int32, int64
from seqarch.ops.native.custom_op import Upstream, empty_gradients
from seqarch.ops.native.huge_pages import like

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, Heads, Heads, Heads, Heads, int32, float64, Pointer)
_PROBLEM = (Offsets, int64, int64, int64, int64, int64, int64)
_forward = cpu_library.Kernel("linear_attention_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = cpu_library.Kernel("linear_attention_backward", *_INPUTS, Heads, *[Pointer] * 6, *_PROBLEM)

unavailable = cpu_library.unavailable


def unsupported(inputs: LinearAttentionInputs) -> str | None:
    return None if inputs.device.type == "cpu" else f"q is on {inputs.device}, expected cpu"


def _arguments(inputs: LinearAttentionInputs) -> tuple[Any, ...]:
    """Of both kernels, up to the state; copied where the last dimension is strided."""
    log_decay, per_key = inputs.log_decay, inputs.log_decay is not None and inputs.log_decay.ndim == 4
    heads = cpu_library.rows(inputs.q), cpu_library.rows(inputs.k), cpu_library.rows(inputs.v)
    decay = cpu_library.rows(log_decay) if log_decay is not None and per_key else log_decay
    return cpu_library.DTYPES[inputs.v.dtype], *heads, decay, per_key, inputs.scale, inputs.state.contiguous()


def _sizes(inputs: LinearAttentionInputs) -> tuple[Any, ...]:
    (_, length, groups, keys), (heads, values) = inputs.q.shape, inputs.v.shape[2:]
    return inputs.offsets, inputs.state.shape[0], length, groups, heads, keys, values


def forward(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    """Of ``q, k, v`` in one dtype, ``log_decay`` and ``state`` in that of sums."""
    outputs = like(inputs.v), like(inputs.state)
    _forward(*_arguments(inputs), *outputs, *_sizes(inputs))
    return outputs


def backward(inputs: LinearAttentionInputs, upstream: Upstream) -> list[Tensor]:
    gradients = empty_gradients(inputs)
    do, dstate_out = upstream.gradients
    _backward(*_arguments(inputs), cpu_library.rows(do), dstate_out.contiguous(), *gradients, *_sizes(inputs))
    return gradients


operator = recurrence_operator("linear_attention", LinearAttentionInputs, forward, backward, chunk_torch.run, "cpu")


def run(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    q, k, v, state, log_decay = inputs.q, inputs.k, inputs.v, inputs.state, inputs.log_decay
    dtype = cpu_library.activation_dtype(state, q, k, v)
    if log_decay is not None:
        log_decay = cpu_library.stepwise(log_decay.to(state.dtype), v)
    o, state = operator(inputs.replace(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), log_decay=log_decay))
    return o.to(v.dtype), state
