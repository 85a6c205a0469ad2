"""The compiled CPU kernel (``csrc/cpu/attention.cpp``): 64 queries over 64 keys at a time, with an online softmax."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.attention.operators import attend, attention_operator, empty_outputs
from seqarch.ops.native import cpu_library
from seqarch.ops.native.cpu_library import Heads, Offsets, Pointer, float64, int32, int64
from seqarch.ops.native.custom_op import Upstream, empty_gradients

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, Heads, Heads, Heads, int32, int64, float64, Pointer)
_PROBLEM = (Offsets, *[int64] * 7)
_forward = cpu_library.Kernel("attention_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = cpu_library.Kernel("attention_backward", *_INPUTS, Heads, Pointer, Heads, *[Pointer] * 3, *_PROBLEM)

unavailable = cpu_library.unavailable


def unsupported(inputs: AttentionInputs) -> str | None:
    return None if inputs.device.type == "cpu" else f"q is on {inputs.device}, expected cpu"


def _arguments(inputs: AttentionInputs) -> tuple[Any, ...]:
    """Of both kernels, up to the start of the keys; copied where the last dimension is strided."""
    heads = cpu_library.rows(inputs.q), cpu_library.rows(inputs.k), cpu_library.rows(inputs.v)
    start = None if inputs.key_start is None else inputs.key_start.contiguous()
    return cpu_library.DTYPES[inputs.v.dtype], *heads, inputs.causal, inputs.window, inputs.scale, start


def _sizes(inputs: AttentionInputs) -> tuple[Any, ...]:
    (batch, queries, heads, keys), (_, length, groups, values) = inputs.q.shape, inputs.v.shape
    sequences = batch if inputs.offsets is None else len(inputs.offsets) - 1
    return inputs.offsets, sequences, queries, length, groups, heads, keys, values


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Logarithms are to base 2."""
    outputs = empty_outputs(inputs)
    _forward(*_arguments(inputs), *outputs, *_sizes(inputs))
    return outputs


def backward(inputs: AttentionInputs, upstream: Upstream) -> list[Tensor]:
    (o, log_sum), (do,) = upstream.kept, upstream.gradients
    dq, dk, dv, none = empty_gradients(inputs)
    outputs = cpu_library.rows(o), log_sum.contiguous(), cpu_library.rows(do)
    _backward(*_arguments(inputs), *outputs, dq, dk, dv, *_sizes(inputs))
    return [dq, dk, dv, none]


operator = attention_operator("attention", forward, backward, "cpu")


def run(inputs: AttentionInputs) -> Tensor:
    return attend(operator, inputs, cpu_library.common_dtype(inputs.q, inputs.k, inputs.v))
