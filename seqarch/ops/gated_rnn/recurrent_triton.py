"""Triton kernels token by token: one launch forward, one backward, and two products for the gradients of the matrices.

A program holds the states of one sequence and head. With gradients, the states of every step are kept, and gates are
computed again from them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.ops.gated_rnn import recurrent_torch
from seqarch.ops.gated_rnn.inputs import GatedRnnInputs
from seqarch.ops.gated_rnn.operators import KernelInputs, empty_outputs, with_keep
from seqarch.ops.native.custom_op import Operator, Upstream
from seqarch.ops.triton import availability

WIDEST = 128
"""The greatest width of a head whose matrices' rows and columns fit into a program's registers."""

unavailable = availability.unavailable


def unsupported(inputs: GatedRnnInputs) -> str | None:
    if inputs.x.shape[4] > WIDEST:
        return f"heads are {inputs.x.shape[4]} wide, expected at most {WIDEST}"
    return availability.unsupported("x", inputs.x, inputs.state.dtype)


def forward(inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
    from seqarch.ops.gated_rnn.launches_triton import GatedRnn

    return GatedRnn(inputs).forward()


def backward(inputs: KernelInputs, upstream: Upstream) -> list[Tensor]:
    from seqarch.ops.gated_rnn.launches_triton import GatedRnn

    (steps,), (do, dlast) = upstream.kept, upstream.gradients
    return GatedRnn(inputs).differentiate(steps, do, dlast)


operator = Operator(
    "gated_rnn_triton", KernelInputs, forward, backward, recurrent_torch.run, empty_outputs, results=2, keeps=(2,),
    devices=("cpu", "cuda"),
)  # fmt: skip


def run(inputs: GatedRnnInputs) -> tuple[Any, Any]:
    o, last, _ = operator(with_keep(inputs))
    return o, last
