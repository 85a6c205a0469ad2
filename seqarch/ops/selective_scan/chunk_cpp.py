"""The compiled CPU kernel (``csrc/cpu/selective_scan.cpp``) as a custom operator, forward and backward.

Step size, skip and gate are computed inside it. Channels lie side by side in vectors, so that the sum over a channel's
states needs none within a vector. The backward pass computes a chunk's decays and states again from the state at its
start, in the cache: memory is ``O(T D + T D N / C)``, with gradients alone.
"""

from __future__ import annotations

from seqarch.ops.native import cpu_library
from seqarch.ops.native.custom_op import KernelPair
from seqarch.ops.selective_scan.inputs import SelectiveScanInputs
from seqarch.ops.selective_scan.operators import Kernels

unavailable = cpu_library.unavailable

CHUNK = 32
"""C, tokens whose decays and states the backward pass holds at once."""

_forward = cpu_library.Kernel("selective_scan_forward", "selective_scan_inputs", "selective_scan_outputs")
_backward = cpu_library.Kernel("selective_scan_backward", "selective_scan_inputs", "selective_scan_gradients")


def unsupported(inputs: SelectiveScanInputs) -> str | None:
    if inputs.device.type != "cpu":
        return f"x is on {inputs.device}, expected cpu"
    for name in ("x", "dt", "B", "C", "z"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.dtype not in cpu_library.DTYPES:
            return f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, cpu_library.DTYPES))}"
    return None


PAIR = KernelPair(_forward, _backward, cpu_library.DTYPES, lambda cu_seqlens, _: cu_seqlens)
KERNELS = Kernels("selective_scan", PAIR, CHUNK, "cpu")
run = KERNELS.run
