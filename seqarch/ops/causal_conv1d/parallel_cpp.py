"""The compiled CPU kernel (``csrc/cpu/causal_conv1d.cpp``) as a custom operator, forward and backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqarch.ops.causal_conv1d.operators import Operators, refuse_dtypes
from seqarch.ops.native import cpu_library
from seqarch.ops.native.cpu_library import Offsets, Pointer, Start, int32, int64
from seqarch.ops.native.custom_op import Engine

unavailable = cpu_library.unavailable

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, Start, int64, int64, Pointer, Pointer, Pointer)
_UPSTREAM = (Start, int64, int64, Pointer)
_PROBLEM = (Offsets, int64, int64, int64, int64, int32)
_forward = cpu_library.Kernel("causal_conv1d_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = cpu_library.Kernel(
    "causal_conv1d_backward", *_INPUTS, *_UPSTREAM, Pointer, Pointer, Pointer, Pointer, *_PROBLEM
)


def refuse(x: Tensor, weight: Tensor, *_: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, expected cpu"
    return refuse_dtypes(x, weight, cpu_library.DTYPES)


ENGINE = Engine(_forward, _backward, cpu_library.DTYPES, lambda cu_seqlens, _: cu_seqlens)
OPERATORS = Operators("causal_conv1d", ENGINE, "cpu")
run = OPERATORS.forward
