"""A linear map with weights of 8 or 4 bits: of a few rows by the compiled CPU kernel (``csrc/cpu/small_weights.cpp``).

Its time is that of reading the codes. The operator takes any number of rows; beyond :data:`MOST_ROWS` it is faster to
widen the weights once and multiply by them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.native import cpu_library
from seqarch.ops.native.linear import operands, takes

MOST_ROWS = 32

FORMATS = {torch.int8: 3, torch.uint8: 4}
"""By the dtype of codes, the header's number: 8 bits, or 4 in blocks."""

BLOCK = 128
"""Codes of 4 bits in a block, 64 bytes."""

_quantized_linear = cpu_library.Kernel("quantized_linear", "quantized_linear_arguments")


def integer_products(allow: bool) -> bool:
    """Let the kernel's sums be of integers where the processor has AVX-512 VNNI, as at the start, or forbid it; returns
    whether they are from now on. For tests: it holds for the process."""
    return bool(cpu_library.library().seqarch_integer_products(int(allow)))


def serves(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel computes a map of ``x``: a few rows of float32 on a CPU, and no gradients."""
    return takes(MOST_ROWS, torch.float32, x, bias)


torch.library.define("seqarch::quantized_linear", "(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor")
quantized_linear = torch.ops.seqarch.quantized_linear.default


@torch.library.impl("seqarch::quantized_linear", "CPU")
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., K]`` to ``[..., N]``: codes and scales as in the header, scales ``[N, groups]``, ``bias [N]``."""
    fields = operands(x, bias, len(codes))
    weights = {"codes": codes.contiguous(), "scales": scales.contiguous(), "groups": scales.shape[1]}
    _quantized_linear({**fields, "format": FORMATS[codes.dtype], **weights})
    return fields["y"]


@torch.library.register_fake("seqarch::quantized_linear")
def _(x, codes, scales, bias):
    return x.new_empty(*x.shape[:-1], codes.shape[0])
