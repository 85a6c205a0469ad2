"""The compiled CPU kernel (``csrc/cpu/gated_rnn.cpp``), forward and backward: a few sequences of one head at a time.

So a head's matrices are read once a step for all of them. With gradients, the states of every step are kept; the
backward pass computes the gates of 16 steps again from them in one product, and adds these steps' share to the
gradients of the matrices in another. Threads take heads and groups of sequences.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.ops.gated_rnn import recurrent_torch
from seqarch.ops.gated_rnn.inputs import GatedRnnInputs
from seqarch.ops.gated_rnn.operators import CELLS, KernelInputs, empty_outputs, with_keep
from seqarch.ops.native import cpu_library
from seqarch.ops.native.custom_op import Operator, Upstream
from seqarch.ops.native.huge_pages import like

_forward = cpu_library.Kernel("gated_rnn_forward", "gated_rnn_inputs", "gated_rnn_outputs")
_backward = cpu_library.Kernel("gated_rnn_backward", "gated_rnn_inputs", "gated_rnn_gradients")

unavailable = cpu_library.unavailable


def unsupported(inputs: GatedRnnInputs) -> str | None:
    if inputs.device.type != "cpu":
        return f"x is on {inputs.device}, expected cpu"
    if inputs.x.dtype not in cpu_library.DTYPES:
        return f"x has dtype {inputs.x.dtype}, expected one of {', '.join(map(str, cpu_library.DTYPES))}"
    return None


def _rows(x: Tensor) -> Tensor:
    """``[B, T, ...]`` in which a token's numbers lie side by side: the tensor itself or a copy."""
    return x if x[:1, :1].is_contiguous() else x.contiguous()


def _fields(inputs: KernelInputs) -> dict[str, Any]:
    x, state = inputs.x, inputs.state
    return {
        "dtype": cpu_library.DTYPES[state.dtype],
        "cell": CELLS[inputs.cell],
        "x": _rows(x),
        "weight": inputs.weight.contiguous(),
        "bias": inputs.bias.contiguous(),
        "state": state.contiguous(),
        "offsets": inputs.offsets,
        "sequences": state.shape[0],
        "length": x.shape[1],
        "heads": x.shape[2],
        "width": x.shape[4],
    }


def forward(inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
    o, last, steps = empty_outputs(inputs)
    _forward(_fields(inputs), {"o": o, "steps": steps if inputs.keep else None, "last": last})
    return o, last, steps


def _gradients(inputs: KernelInputs, upstream: Upstream) -> list[Tensor]:
    """Those of x, weight, bias and state, uninitialised."""
    return [like(each) for each in (inputs.x, inputs.weight, inputs.bias, inputs.state)]


def backward(inputs: KernelInputs, upstream: Upstream) -> list[Tensor]:
    (steps,), (do, dlast) = upstream.kept, upstream.gradients
    gradients = _gradients(inputs, upstream)
    written = dict(zip(("dx", "dweight", "dbias", "dstate"), gradients, strict=True))
    _backward(_fields(inputs), {"dout": _rows(do), "steps": steps, "dlast": dlast.contiguous(), **written})
    return gradients


operator = Operator(
    "gated_rnn", KernelInputs, forward, backward, recurrent_torch.run, empty_outputs, _gradients,
    results=2, keeps=(2,), devices="cpu",
)  # fmt: skip


def run(inputs: GatedRnnInputs) -> tuple[Tensor, Tensor]:
    o, last, _ = operator(with_keep(inputs))
    return o, last
