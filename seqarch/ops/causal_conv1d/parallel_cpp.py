"""The compiled CPU kernel (``csrc/cpu/causal_conv1d.cpp``) as a custom operator, forward and backward."""

from __future__ import annotations

from seqarch.ops.causal_conv1d.inputs import CausalConv1dInputs
from seqarch.ops.causal_conv1d.operators import Kernels, unsupported_dtypes
from seqarch.ops.native import cpu_library
from seqarch.ops.native.custom_op import KernelPair

unavailable = cpu_library.unavailable

_forward = cpu_library.Kernel("causal_conv1d_forward", "causal_conv1d_inputs", "causal_conv1d_outputs")
_backward = cpu_library.Kernel("causal_conv1d_backward", "causal_conv1d_inputs", "causal_conv1d_gradients")


def unsupported(inputs: CausalConv1dInputs) -> str | None:
    if inputs.device.type != "cpu":
        return f"x is on {inputs.device}, expected cpu"
    return unsupported_dtypes(inputs, cpu_library.DTYPES)


PAIR = KernelPair(_forward, _backward, cpu_library.DTYPES, lambda cu_seqlens, _: cu_seqlens)
KERNELS = Kernels("causal_conv1d", PAIR, "cpu")
run = KERNELS.operator
