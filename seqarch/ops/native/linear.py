"""A linear map of a few rows by the compiled CPU kernel (``csrc/cpu/linear.cpp``), for decoding.

Its time is that of reading the weights, which torch's product of few rows reads at a half to a fifth of the speed.
"""

from __future__ import annotations

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
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.numel() <= MOST_ROWS * x.shape[-1]
        and weight.numel() >= LEAST_WEIGHTS
        and weight.dtype in (torch.float32, torch.bfloat16)
        and all(tensor.dtype == weight.dtype and tensor.device.type == "cpu" for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.is_autocast_enabled("cpu")
        and active_transform() is None
        and cpu_library.unavailable() is None
    )


# Neither custom_op nor an autograd formula: their wrappers would take longer than the kernel on a narrow layer.
torch.library.define("seqarch::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
linear = torch.ops.seqarch.linear.default


@torch.library.impl("seqarch::linear", "CPU")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., K]``, ``weight [N, K]``, ``bias [N]`` to ``[..., N]``."""
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    bias = None if bias is None else bias.contiguous()
    width, depth = weight.shape
    arguments = {
        "dtype": cpu_library.DTYPES[x.dtype],
        "x": x,
        "weight": weight,
        "bias": bias,
        "y": y,
        "rows": y.numel() // max(1, width),
        "depth": depth,
        "width": width,
    }
    _linear(arguments)
    return y


@torch.library.register_fake("seqarch::linear")
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
