"""Triton kernels: the products of all experts in one launch, in tiles of rows of one expert.

For what torch's own grouped product computes in a loop: float16, float32, GPUs before Hopper, and widths that are no
multiple of 8. float32 products are TF32, three for one where float32 is asked to be exact. The gradient of a matrix is
added up by one program, in the order of the rows.
"""

from __future__ import annotations

from torch import Tensor

from seqarch.ops.experts import groups
from seqarch.ops.experts.inputs import ExpertsInputs
from seqarch.ops.triton import availability

unavailable = availability.unavailable


def unsupported(inputs: ExpertsInputs) -> str | None:
    return availability.unsupported("x", inputs.x, groups.product_dtype(inputs.x))


def _matmul(rows: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    from seqarch.ops.experts.launches_triton import matmul

    return matmul(rows, weight, starts)


def _outer(left: Tensor, right: Tensor, starts: Tensor) -> Tensor:
    from seqarch.ops.experts.launches_triton import outer

    return outer(left, right, starts)


grouped_matmul, grouped_outer = groups.differentiable("grouped_triton", _matmul, _outer)


def run(inputs: ExpertsInputs) -> Tensor:
    return groups.run(grouped_matmul, inputs)
