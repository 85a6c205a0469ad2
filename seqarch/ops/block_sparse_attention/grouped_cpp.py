"""The compiled CPU kernel (``csrc/cpu/block_sparse_attention.cpp``): a block and the queries that list it, in tiles."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention.inputs import BlockSparseAttentionInputs, ListInputs
from seqarch.ops.block_sparse_attention.lists import ListOperators, zero_outputs
from seqarch.ops.native import cpu_library
from seqarch.ops.native.custom_op import Upstream, as_given
from seqarch.ops.native.huge_pages import in_huge_pages

_forward = cpu_library.Kernel("block_sparse_attention_forward", "block_sparse_attention_inputs", "attention_outputs")
_backward = cpu_library.Kernel(
    "block_sparse_attention_backward", "block_sparse_attention_inputs", "attention_gradients"
)

unavailable = cpu_library.unavailable


def unsupported(inputs: BlockSparseAttentionInputs) -> str | None:
    return None if inputs.device.type == "cpu" else f"q is on {inputs.device}, expected cpu"


def _fields(inputs: ListInputs) -> dict[str, Any]:
    """``seqarch_block_sparse_attention_inputs``, copied where the last dimension is strided."""
    q, k, v, lists, first = inputs.q, inputs.k, inputs.v, inputs.lists, inputs.first
    return {
        "dtype": cpu_library.DTYPES[v.dtype],
        "q": cpu_library.rows(q),
        "k": cpu_library.rows(k),
        "v": cpu_library.rows(v),
        "index": lists.contiguous(),
        "first": first.contiguous(),
        "listed": lists.shape[3],
        "first_stride": first.shape[1] if first.shape[0] > 1 else 0,
        "block_size": inputs.block_size,
        "window": inputs.window,
        "scale": inputs.scale,
        "batch": q.shape[0],
        "queries": q.shape[1],
        "keys": k.shape[1],
        "groups": k.shape[2],
        "lists": lists.shape[2],
        "heads": q.shape[2],
        "key_width": q.shape[3],
        "value_width": v.shape[3],
    }


def forward(inputs: ListInputs) -> tuple[Tensor, Tensor]:
    """Logarithms are to base 2."""
    o, log_sum = zero_outputs(inputs)
    inputs = inputs.to(cpu_library.common_dtype(inputs.q, inputs.k, inputs.v))
    wide = o.to(inputs.v.dtype)
    _forward(_fields(inputs), {"o": wide, "log_sum": log_sum})
    return wide.to(o.dtype), log_sum


def backward(inputs: ListInputs, upstream: Upstream) -> list[Tensor]:
    (o, log_sum), (do, *dlse) = upstream.kept, upstream.gradients
    dtype = cpu_library.common_dtype(inputs.q, inputs.k, inputs.v)
    dq, dk, dv = (in_huge_pages(torch.empty(x.shape, dtype=dtype)) for x in (inputs.q, inputs.k, inputs.v))
    outputs = {"o": cpu_library.rows(o.to(dtype)), "dout": cpu_library.rows(do.to(dtype))}
    outputs |= {"log_sum": log_sum.contiguous(), "dlse": dlse[0].div(math.log(2)).contiguous() if dlse else None}
    outputs["dkey_bias"] = None
    _backward(_fields(inputs.to(dtype)), outputs | {"dq": dq, "dk": dk, "dv": dv})
    return as_given(inputs, (dq, dk, dv, None, None))


operators = ListOperators(
    "block_sparse_attention_compiled", forward, backward, blocks=lambda lists: lists, unit=math.log(2)
)


def run(inputs: BlockSparseAttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    return operators(inputs, ListInputs.of(inputs))
