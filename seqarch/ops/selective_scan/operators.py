"""Compiled kernels of the selective scan as custom operators: the C++ and the CUDA backend share them.

Step size, skip and gate are computed inside a kernel. The backward pass computes a chunk's decays and states again from
the state before it, which the forward pass keeps: memory is ``O(T D + T D N / C)``, with gradients alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.native.custom_op import KernelPair, Operator, Upstream
from seqarch.ops.native.huge_pages import in_huge_pages, like
from seqarch.ops.selective_scan import recurrent_torch
from seqarch.ops.selective_scan.inputs import SelectiveScanInputs


@dataclass(frozen=True)
class KernelInputs(SelectiveScanInputs):
    """The inputs as the kernels take them: ``A``, ``D`` and ``dt_bias`` in the dtype of sums.

    Attributes:
        keep: whether the states before chunks are kept for the backward pass.
    """

    keep: bool


def rows(m: Tensor) -> Tensor:
    """``[B, T, ...]`` in which a token's elements lie side by side: the tensor itself or a copy."""
    side_by_side = m.stride(-1) == 1 and (m.ndim == 3 or m.stride(2) == m.shape[3])
    return m if side_by_side else m.contiguous()


class Kernels:
    """A pair of kernels, and the operator of both.

    Args:
        name: of the operator, after ``seqarch::``.
        chunk: C, the tokens between two states that are kept.
        device: the type of device that it runs on; ``None``: any.
    """

    def __init__(self, name: str, pair: KernelPair, chunk: int, device: str | None):
        self.pair, self.chunk = pair, chunk
        self.operator = Operator(
            name, KernelInputs, self._forward, self._backward, recurrent_torch.run, self._outputs, _gradients,
            results=2, keeps=(2,), devices=device,
        )  # fmt: skip

    def run(self, inputs: SelectiveScanInputs) -> tuple[Tensor, Tensor]:
        dtype = inputs.state.dtype
        D, dt_bias = (None if m is None else m.to(dtype) for m in (inputs.D, inputs.dt_bias))
        given: tuple[Any, ...] = inputs.replace(A=inputs.A.to(dtype), D=D, dt_bias=dt_bias).values()
        keep = torch.is_grad_enabled() and any(isinstance(m, Tensor) and m.requires_grad for m in given)
        y, last, _ = self.operator(KernelInputs(*given, keep=keep))
        return y, last

    def _fields(self, inputs: KernelInputs) -> dict[str, Any]:
        """``seqarch_selective_scan_inputs``, copied where numbers do not lie as the kernels read them."""
        x, A, D, z, dt_bias = inputs.x, inputs.A, inputs.D, inputs.z, inputs.dt_bias
        return {
            "dtype": self.pair.numbers[A.dtype],
            "softplus": inputs.dt_softplus,
            "scale_input": inputs.scale_input,
            "x": rows(x),
            "dt": rows(inputs.dt),
            "B": rows(inputs.B),
            "C": rows(inputs.C),
            "z": None if z is None else rows(z),
            "A": A.contiguous(),
            "D": None if D is None else D.contiguous(),
            "dt_bias": None if dt_bias is None else dt_bias.contiguous(),
            "state": inputs.state.contiguous(),
            "offsets": self.pair.offsets(inputs.offsets, x.device),
            "sequences": len(inputs.state),
            "length": x.shape[1],
            "channels": x.shape[2],
            "state_width": A.shape[1],
            "groups": inputs.B.shape[2],
            "chunk": self.chunk,
        }

    def _outputs(self, inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
        """y, the last state and the states that are kept, uninitialised."""
        count = self._chunks(inputs) if inputs.keep else 0
        starts = inputs.state.new_empty(count, inputs.A.shape[0] * inputs.A.shape[1])
        return like(inputs.x), like(inputs.state), in_huge_pages(starts)

    def _chunks(self, inputs: KernelInputs) -> int:
        """Chunks of all sequences."""
        if inputs.offsets is None:
            return inputs.x.shape[0] * -(-inputs.length // self.chunk)
        return sum(-(-(end - start) // self.chunk) for start, end in pairwise(inputs.offsets))

    def _forward(self, inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
        """y, the last state and, to keep for the backward pass, the state before each chunk."""
        y, last, starts = self._outputs(inputs)
        kept = starts if inputs.keep else None
        self.pair.forward(self._fields(inputs), {"y": y, "state_out": last, "starts": kept})
        return y, last, starts

    def _backward(self, inputs: KernelInputs, upstream: Upstream) -> list[Tensor]:
        """The gradients of x, dt, A, B, C, D, z, dt_bias and state; those of B and C only where they are needed."""
        (starts,), (dy, dlast) = upstream.kept, upstream.gradients
        gradients = _gradients(inputs, upstream)
        names = "dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dstate"
        written: dict[str, Tensor | None] = dict(zip(names, gradients, strict=True))
        if not _shares(upstream):
            written |= {"dB": None, "dC": None}
        if inputs.z is None:
            written["dz"] = None
        above = {"starts": starts, "dy": rows(dy), "dstate_out": dlast.contiguous()}
        self.pair.backward(self._fields(inputs), above | written)
        return gradients


def _shares(upstream: Upstream) -> bool:
    """Whether the gradients of B and C, which channels share, are needed."""
    return upstream.needed[3] or upstream.needed[4]


def _gradients(inputs: KernelInputs, upstream: Upstream) -> list[Tensor]:
    """Those of the tensors, uninitialised; without elements where there are none."""
    x, A = inputs.x, inputs.A
    dB, dC = (like(m) if _shares(upstream) else m.new_empty(0) for m in (inputs.B, inputs.C))
    dz = x.new_empty(0) if inputs.z is None else like(inputs.z)
    dstate = like(upstream.gradients[1])
    return [like(x), like(inputs.dt), like(A), dB, dC, A.new_empty(len(A)), dz, A.new_empty(len(A)), dstate]
