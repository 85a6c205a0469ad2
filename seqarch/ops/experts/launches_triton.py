"""Launches the Triton kernels of grouped products."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from seqarch.ops.experts import kernels
from seqarch.ops.triton import launch
from seqarch.ops.triton.autotune import Configuration
from seqarch.ops.triton.launch import Tuned, block, products

CONFIGURATIONS = Configuration(8, 3), Configuration(8, 2), Configuration(4, 3)


def matmul(rows: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """``rows [M, D]``, sorted, times their experts' matrices of ``weight [E, D, F]``; ``starts`` on the CPU."""
    (count, inner), width = rows.shape, weight.shape[2]
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = rows.new_empty(count, width)
    out[: int(starts[0])] = 0
    M, N, D = _tiles(rows.dtype)
    N, D = block(width, N), block(inner, D)
    table = tiles(starts, M).to(rows.device)
    launch.launch(
        Tuned(kernels.grouped_matmul, CONFIGURATIONS), len(table) * triton.cdiv(width, N),
        rows, weight, out, table, rows.stride(0), *weight.stride(), inner, width, M=M, N=N, D=D, **products(rows.dtype),
    )  # fmt: skip
    return out


def outer(left: Tensor, right: Tensor, starts: Tensor) -> Tensor:
    """For each expert the sum of its rows' outer products, ``[E, D, F]``; ``starts`` on the CPU."""
    left, right = (x if x.stride(1) == 1 else x.contiguous() for x in (left, right))
    experts, height, width = len(starts) - 1, left.shape[1], right.shape[1]
    out = left.new_empty(experts, height, width)
    M, N, D = _tiles(left.dtype)
    M, N = block(height, M), block(width, N)
    launch.launch(
        Tuned(kernels.grouped_outer, CONFIGURATIONS), experts * triton.cdiv(height, M) * triton.cdiv(width, N),
        left, right, out, starts.to(left.device), left.stride(0), right.stride(0), height, width,
        M=M, N=N, D=D, **products(left.dtype),
    )  # fmt: skip
    return out


def _tiles(dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows and columns of a tile, and how many terms of its sums are added at a time."""
    return (128, 128, 32) if dtype.itemsize == 2 else (64, 64, 32)


def tiles(starts: Tensor, size: int) -> Tensor:
    """``[n, 3]``: of each tile of rows of one expert, which, its first row, and where the expert's rows end."""
    counts = starts.diff()
    each = (counts + size - 1) // size
    expert = torch.arange(len(counts)).repeat_interleave(each)
    inside = torch.arange(len(expert)) - (each.cumsum(0) - each)[expert]
    return torch.stack([expert, starts[expert] + inside * size, starts[expert + 1]], dim=1)
