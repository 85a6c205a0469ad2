"""The CUDA kernel (``csrc/cuda/causal_conv1d.cu``) as a custom operator, forward and backward.

A thread takes four channels through a run of tokens and reads each row once, so that time is that of the bytes. The
gradient of the weights is summed run by run, in a fixed order.
"""

from __future__ import annotations

from seqarch.ops.causal_conv1d.inputs import CausalConv1dInputs
from seqarch.ops.causal_conv1d.operators import Kernels, unsupported_dtypes
from seqarch.ops.native import cuda_library
from seqarch.ops.native.cpu_library import NUMBERS, Pointer, Start, int32, int64
from seqarch.ops.native.custom_op import KernelPair

unavailable = cuda_library.unavailable

# The order of the header, csrc/include/seqarch_cuda.h.
_INPUTS = (int32, Start, int64, int64, Pointer, Pointer, Pointer)
_UPSTREAM = (Start, int64, int64, Pointer)
_PROBLEM = (Pointer, int64, int64, int64, int64, int32)
_forward = cuda_library.Kernel("causal_conv1d_forward", *_INPUTS, Pointer, Pointer, *_PROBLEM)
_backward = cuda_library.Kernel("causal_conv1d_backward", *_INPUTS, *_UPSTREAM, *[Pointer] * 4, *_PROBLEM)


def unsupported(inputs: CausalConv1dInputs) -> str | None:
    return cuda_library.unsupported(x=inputs.x) or unsupported_dtypes(inputs, NUMBERS)


PAIR = KernelPair(_forward, _backward, NUMBERS, cuda_library.offsets)
KERNELS = Kernels("causal_conv1d_cuda", PAIR, None)
run = KERNELS.operator
