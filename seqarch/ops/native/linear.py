"""A linear map of a few rows by the compiled CPU kernel (``csrc/cpu/linear.cpp``), for decoding.

Its time is that of reading the weights, which torch's product of few rows reads at a half to a fifth of the speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqarch.ops.dispatch.eager import active_transform
from seqarch.ops.native import cpu_library

MOST_ROWS = 4
"""From 8 rows on torch's product is as fast."""

LEAST_WEIGHTS = 2**17
"""Fewer take torch less time than another operator's call."""

_linear = cpu_library.Kernel("linear", "linear_arguments")


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel computes ``x weight^T + bias``, and faster than torch: float32 or bfloat16, no gradients."""
    return (
        weight.numel() >= LEAST_WEIGHTS
        and x.shape[-1] == weight.shape[-1]  # otherwise torch says what is wrong
        and weight.dtype in (torch.float32, torch.bfloat16)
        and takes(MOST_ROWS, weight.dtype, x, weight, bias)
    )


def takes(most_rows: int, dtype: torch.dtype, x: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel of few rows takes these: of this dtype, on a CPU, without gradients, nobody looking on."""
    tensors = (x, *(each for each in others if each is not None))
    return (
        x.numel() <= most_rows * x.shape[-1]
        and all(tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.is_autocast_enabled("cpu")
        and active_transform() is None
        and cpu_library.unavailable() is None
    )


def operands(x: Tensor, bias: Tensor | None, width: int) -> dict[str, Any]:
    """The fields of a map ``[..., K]`` to ``[..., N]``, N the width, whatever its weights; its result is ``y``."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], width)
    return {
        "x": x,
        "bias": None if bias is None else bias.contiguous(),
        "y": y,
        "rows": y.numel() // max(1, width),
        "depth": x.shape[-1],
        "width": width,
    }


# Neither custom_op nor an autograd formula: their wrappers would take longer than the kernel on a narrow layer.
torch.library.define("seqarch::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
linear = torch.ops.seqarch.linear.default


@torch.library.impl("seqarch::linear", "CPU")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., K]``, ``weight [N, K]``, ``bias [N]`` to ``[..., N]``."""
    fields = operands(x, bias, len(weight))
    _linear({**fields, "dtype": cpu_library.DTYPES[x.dtype], "weight": weight.contiguous()})
    return fields["y"]


@torch.library.register_fake("seqarch::linear")
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
