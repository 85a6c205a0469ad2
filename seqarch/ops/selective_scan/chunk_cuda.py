"""The CUDA kernel (``csrc/cuda/selective_scan.cu``) as a custom operator, forward and backward.

A chunk's rows come through shared memory; a channel's states lie in the registers of a few lanes of a warp, which take
it through the chunk. Few channels and long sequences fill the GPU too: time is cut into segments, a first pass finds
the state that enters each. The backward pass computes a chunk's states again, into registers, from the one kept before
it. Every sum is taken in a fixed order.
"""

from __future__ import annotations

from seqarch.ops.native import cuda_library
from seqarch.ops.native.arguments import NUMBERS
from seqarch.ops.native.cuda_library import CHUNK, STATES
from seqarch.ops.native.custom_op import KernelPair
from seqarch.ops.selective_scan.inputs import SelectiveScanInputs
from seqarch.ops.selective_scan.operators import Kernels

unavailable = cuda_library.unavailable

_forward = cuda_library.Kernel("selective_scan_forward", "selective_scan_inputs", "selective_scan_outputs")
_backward = cuda_library.Kernel("selective_scan_backward", "selective_scan_inputs", "selective_scan_gradients")


def unsupported(inputs: SelectiveScanInputs) -> str | None:
    states, dtype = inputs.A.shape[1], inputs.state.dtype
    if states > STATES[dtype]:
        return f"N is {states}, expected at most {STATES[dtype]} with sums in {dtype}"
    return cuda_library.unsupported(x=inputs.x, dt=inputs.dt, B=inputs.B, C=inputs.C, z=inputs.z)


PAIR = KernelPair(_forward, _backward, NUMBERS, cuda_library.offsets)
KERNELS = Kernels("selective_scan_cuda", PAIR, CHUNK, None)
run = KERNELS.run
