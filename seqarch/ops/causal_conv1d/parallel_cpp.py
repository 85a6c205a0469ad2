"""The compiled CPU kernel (``csrc/cpu/causal_conv1d.cpp``) as a custom operator, forward and backward."""

from __future__ import annotations

from seqarch.ops.causal_conv1d.inputs import CausalConv1dInputs
from seqarch.ops.causal_conv1d.operators import Kernels, unsupported_dtypes
from seqarch.ops.native import cpu_library
from seqarch.ops.native.cpu_library import Offsets, Pointer, Start, int32, int64
from seqarch.ops.native.custom_op import KernelPair

unavailable = cpu_library.unavailable

# The order of the header, csrc/include/seqarch.h.
_INPUTS = (int32, Start, int64, int64, Pointer, Pointer, Pointer)
_UPSTREAM = (Start, int64, int64, Pointer)
_PROBLEM = (Offsets, int64, int64, int64, int64, int32)
_forward = cpu_library.Kernel("causal_conv1d_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = cpu_library.Kernel(
    "causal_conv1d_backward", *_INPUTS, *_UPSTREAM, Pointer, Pointer, Pointer, Pointer, *_PROBLEM
)


def unsupported(inputs: CausalConv1dInputs) -> str | None:
    if inputs.device.type != "cpu":
        return f"x is on {inputs.device}, expected cpu"
    return unsupported_dtypes(inputs, cpu_library.DTYPES)


PAIR = KernelPair(_forward, _backward, cpu_library.DTYPES, lambda cu_seqlens, _: cu_seqlens)
KERNELS = Kernels("causal_conv1d", PAIR, "cpu")
run = KERNELS.operator
