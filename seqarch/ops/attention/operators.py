"""Custom operators around the compiled and the Triton kernels, which keep nothing but inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


class AttentionOperators:
    """A pair of kernels as two custom operators: of o alone, and of o and the logarithms of the softmax's sums.

    Both keep these logarithms for the backward pass, and the second has their gradient too. ``q, k, v`` are of one
    dtype, ``key_bias`` of that of its sums, and ``key_start`` is int64.

    Args:
        unit: natural logarithms in one of the kernel's.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[AttentionInputs], tuple[Tensor, Tensor]],
        backward: Callable[[AttentionInputs, Upstream], Sequence[Tensor]],
        devices: str | Sequence[str],
        unit: float = 1.0,
    ):
        def with_sums(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
            o, lse = _by_torch(inputs)
            return o, lse / unit

        self.unit = unit
        kernels = AttentionInputs, forward, backward
        given = {"outputs": empty_outputs, "keeps": (0, 1), "devices": devices}
        self.outputs = Operator(name, *kernels, _by_torch, **given)
        self.with_sums = Operator(f"{name}_lse", *kernels, with_sums, results=2, **given)

    def __call__(self, inputs: AttentionInputs, dtype: torch.dtype) -> Tensor | tuple[Tensor, Tensor]:
        """o in v's dtype, and the logarithms where they are asked for, by operators that take q, k, v in this dtype."""
        q, k, v, key_start = inputs.q, inputs.k, inputs.v, inputs.key_start
        start = None if key_start is None else key_start.long()
        q, k, v, bias = q.to(dtype), k.to(dtype), v.to(dtype), inputs.key_bias
        bias = None if bias is None else bias.to(accumulation_dtype(v))
        given = inputs.replace(q=q, k=k, v=v, key_start=start, key_bias=bias)
        o, log_sum = (self.with_sums if inputs.return_lse else self.outputs)(given)
        if not inputs.return_lse:
            return o.to(inputs.v.dtype)
        lse, blind = log_sum * self.unit if self.unit != 1 else log_sum, inputs.blind()
        return o.to(inputs.v.dtype), lse if blind is None else lse.masked_fill(blind.unsqueeze(-1), -torch.inf)


def _by_torch(inputs: AttentionInputs) -> Any:
    return (chunk_sdpa if inputs.window else parallel_sdpa).run(inputs, plain=True)
