"""Custom operators around the compiled and the Triton kernels, which keep nothing but inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seqarch.ops.attention import chunk_sdpa, parallel_sdpa
from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.native.custom_op import Operator, Upstream
from seqarch.ops.native.huge_pages import in_huge_pages


def empty_outputs(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """o ``[B, Tq, H, V]`` and the logarithms of the softmax's sums ``[B, Tq, H]``, uninitialised."""
    q, v = inputs.q, inputs.v
    return in_huge_pages(v.new_empty(*q.shape[:3], v.shape[3])), v.new_empty(q.shape[:3], dtype=accumulation_dtype(v))


def attention_operator(
    name: str,
    forward: Callable[[AttentionInputs], tuple[Tensor, Tensor]],
    backward: Callable[[AttentionInputs, Upstream], Sequence[Tensor]],
    devices: str | Sequence[str],
) -> Operator[AttentionInputs]:
    """The operator of o and the logarithms of the softmax's sums, both of which the backward pass takes.

    ``q, k, v`` are of one dtype, and ``key_start`` is int64.
    """
    return Operator(name, AttentionInputs, forward, backward, _by_torch, empty_outputs, keeps=(0, 1), devices=devices)


def _by_torch(inputs: AttentionInputs) -> Tensor:
    return (chunk_sdpa if inputs.window else parallel_sdpa).run(inputs, plain=True)


def attend(operator: Operator[AttentionInputs], inputs: AttentionInputs, dtype: torch.dtype) -> Tensor:
    """o in v's dtype, by an operator that takes q, k and v in this one."""
    q, k, v, key_start = inputs.q, inputs.k, inputs.v, inputs.key_start
    start = None if key_start is None else key_start.long()
    o, _ = operator(inputs.replace(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), key_start=start))
    return o.to(v.dtype)
