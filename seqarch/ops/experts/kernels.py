"""Triton kernels of grouped products: rows sorted by expert times the experts' matrices, and the gradient of these."""

# Triton gives Python's syntax another meaning than its types say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from seqarch.ops.triton.tiles import dot, put


@triton.jit
def grouped_matmul(
    rows, weight, out, tiles, stride, weight_expert, weight_row, weight_column, inner, width,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WORK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [rows, width]``; one program per tile of M rows of one expert and N columns. Tiles of the same rows are
    neighbours. ``weight [E, inner, width]``, with any strides."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, N)
    place = tiles + pid // blocks * 3
    expert, first = tl.load(place), tl.load(place + 1)
    count = tl.minimum(tl.load(place + 2) - first, M)
    r, d = tl.arange(0, M)[:, None], tl.arange(0, D)
    c = pid % blocks * N + tl.arange(0, N)[None, :]
    rows += first * stride
    weight += expert * weight_expert
    total = tl.zeros([M, N], ACC)
    lefts, rights = rows + r * stride + d[None, :], weight + d[:, None] * weight_row + c * weight_column
    for start in range(0, inner, D):
        left = tl.load(lefts, mask=(r < count) & (start + d[None, :] < inner), other=0.0)
        right = tl.load(rights, mask=(start + d[:, None] < inner) & (c < width), other=0.0)
        total += dot(left, right, WORK, PRECISION)
        lefts += D
        rights += D * weight_row
    put(out + first * width, total, r, c, count, width, width)


@triton.jit
def grouped_outer(
    left, right, out, starts, left_stride, right_stride, height, width,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WORK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [E, height, width]``; one program per expert, M rows and N columns of it, which adds up D of its rows at a
    time."""
    pid = tl.program_id(0).to(tl.int64)
    across, blocks = tl.cdiv(width, N), tl.cdiv(height, M) * tl.cdiv(width, N)
    expert = pid // blocks
    first, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    r = pid % blocks // across * M + tl.arange(0, M)[:, None]
    c = pid % across * N + tl.arange(0, N)[None, :]
    d = tl.arange(0, D)
    total = tl.zeros([M, N], ACC)
    for start in range(0, (end - first).to(tl.int32), D):
        token = first + start + d
        transposed = tl.load(
            left + token[None, :] * left_stride + r, mask=(token[None, :] < end) & (r < height), other=0.0
        )
        rows = tl.load(right + token[:, None] * right_stride + c, mask=(token[:, None] < end) & (c < width), other=0.0)
        total += dot(transposed, rows, WORK, PRECISION)
    put(out + expert * height * width, total, r, c, height, width, width)
