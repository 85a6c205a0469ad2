"""The CUDA kernel (``csrc/cuda/causal_conv1d.cu``) as a custom operator, forward and backward.

A thread takes four channels through a run of tokens and reads each row once, so that time is that of the bytes. The
gradient of the weights is summed run by run, in a fixed order.
"""

from __future__ import annotations

from seqarch.ops.causal_conv1d.inputs import CausalConv1dInputs
from seqarch.ops.causal_conv1d.operators import Kernels, unsupported_dtypes
from seqarch.ops.native import cuda_library
from seqarch.ops.native.arguments import NUMBERS
from seqarch.ops.native.custom_op import KernelPair

unavailable = cuda_library.unavailable

_forward = cuda_library.Kernel("causal_conv1d_forward", "causal_conv1d_inputs", "causal_conv1d_outputs")
_backward = cuda_library.Kernel("causal_conv1d_backward", "causal_conv1d_inputs", "causal_conv1d_gradients")


def unsupported(inputs: CausalConv1dInputs) -> str | None:
    return cuda_library.unsupported(x=inputs.x) or unsupported_dtypes(inputs, NUMBERS)


PAIR = KernelPair(_forward, _backward, NUMBERS, cuda_library.offsets)
KERNELS = Kernels("causal_conv1d_cuda", PAIR, None)
run = KERNELS.operator
