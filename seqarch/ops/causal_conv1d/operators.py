"""Compiled kernels of the causal convolution as custom operators: the C++ and the CUDA backend share them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqarch.ops.causal_conv1d import parallel_torch
from seqarch.ops.causal_conv1d.inputs import CausalConv1dInputs
from seqarch.ops.native.custom_op import KernelPair, Operator, Upstream
from seqarch.ops.native.huge_pages import like


def unsupported_dtypes(inputs: CausalConv1dInputs, numbers: dict[torch.dtype, int]) -> str | None:
    """Why kernels that know these dtypes cannot serve a call."""
    x, weight = inputs.x, inputs.weight
    if x.dtype not in numbers:
        return f"x has dtype {x.dtype}, expected one of {', '.join(map(str, numbers))}"
    if weight.dtype != torch.float32 and x.dtype != weight.dtype:
        return f"x has dtype {x.dtype} beside {weight.dtype} parameters, expected the same"
    return None


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels lie side by side, else a copy in which they do."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


class Kernels:
    """A pair of kernels, and the operator of both.

    Args:
        name: of the operator, after ``seqarch::``.
        device: the type of device that it runs on; ``None``: any.
    """

    def __init__(self, name: str, pair: KernelPair, device: str | None):
        self.pair = pair
        self.operator = Operator(
            name, CausalConv1dInputs, self._forward, self._backward, parallel_torch.run, _outputs, _gradients,
            results=2, devices=device,
        )  # fmt: skip

    def _fields(self, inputs: CausalConv1dInputs) -> dict[str, Any]:
        """``seqarch_causal_conv1d_inputs``, copied where numbers do not lie as the kernels read them."""
        x, bias, state = inputs.x, inputs.bias, inputs.state
        return {
            "x": _rows(x),
            "weight": inputs.weight.contiguous(),
            "bias": None if bias is None else bias.contiguous(),
            "state": None if state is None else state.contiguous(),
            "offsets": self.pair.offsets(inputs.offsets, x.device),
            "sequences": inputs.sequences,
            "length": x.shape[1],
            "channels": x.shape[2],
            "width": inputs.weight.shape[1],
            "silu": inputs.silu,
        }

    def _forward(self, inputs: CausalConv1dInputs) -> tuple[Tensor, Tensor]:
        y, state_out = _outputs(inputs)
        self.pair.forward(self._fields(inputs), {"y": y, "state_out": state_out})
        return y, state_out

    def _backward(self, inputs: CausalConv1dInputs, upstream: Upstream) -> list[Tensor]:
        """The gradients of x, weight, bias and state; of the last two also where there is no bias or state."""
        gradients, (dy, dstate_out) = _gradients(inputs, upstream), upstream.gradients
        written = dict(zip(("dx", "dweight", "dbias", "dstate"), gradients, strict=True))
        self.pair.backward(self._fields(inputs), {"dy": _rows(dy), "dstate_out": dstate_out.contiguous(), **written})
        return gradients


def _outputs(inputs: CausalConv1dInputs) -> tuple[Tensor, Tensor]:
    """A tensor like x and a state, uninitialised."""
    x = inputs.x
    return like(x), x.new_empty(inputs.sequences, inputs.weight.shape[1] - 1, x.shape[2])


def _gradients(inputs: CausalConv1dInputs, upstream: Upstream) -> list[Tensor]:
    """Those of x, weight, bias and state, uninitialised."""
    dx, dstate = _outputs(inputs)
    weight = inputs.weight
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return [dx, dweight, weight.new_empty(weight.shape[0]), dstate]
