"""Triton kernels for the sums of decays inside a chunk, and for the gradient of the decays.

They run token by token, each lane on its own head or key dimension: no scan across lanes, whose order of addition and
whose code differ from one version of Triton to another.
"""

# Triton gives Python's syntax another meaning than its types say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from seqarch.ops.triton.tiles import CHUNK, SUB

STRONGEST = tl.constexpr(-1000.0)
"""Log decays of heads are held above this: its exponential is 0, and differences of sums stay finite for -inf."""


@triton.jit
def scalar_sums(log_decay, high, low, starts, ends, stride, heads, LANES: tl.constexpr):
    """The sums ``(high, low)``, ``[rows, heads]`` each, of ``log_decay [rows, heads]``; one program per chunk and
    lanes."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(heads, LANES)
    start, end = tl.load(starts + pid // blocks), tl.load(ends + pid // blocks)
    head = pid % blocks * LANES + tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    here = head < heads
    for i in range(tl.minimum(CHUNK, end - start)):
        step = tl.load(log_decay + (start + i) * stride + head, mask=here, other=0.0).to(tl.float64)
        total += tl.where(step < STRONGEST, STRONGEST, step)
        rounded = total.to(high.dtype.element_ty)
        tl.store(high + (start + i) * heads + head, rounded, mask=here)
        rest = (total - rounded.to(tl.float64)).to(high.dtype.element_ty)
        tl.store(low + (start + i) * heads + head, rest, mask=here)


@triton.jit
def vector_sums(log_decay, before, after, starts, ends, stride, heads, K: tl.constexpr, LANES: tl.constexpr):
    """The sums ``(before, after)``, ``[rows, heads, K]`` each, of ``log_decay [rows, heads, K]``; one program per
    sub-chunk and head."""
    pid = tl.program_id(0).to(tl.int64)
    head, piece = pid % heads, pid // heads
    chunk = piece // (CHUNK // SUB)
    start, end = tl.load(starts + chunk) + piece % (CHUNK // SUB) * SUB, tl.load(ends + chunk)
    count = tl.minimum(SUB, end - start)
    c = tl.arange(0, LANES)
    here = c < K
    total = tl.zeros([LANES], before.dtype.element_ty)
    for i in range(count):
        step = tl.load(log_decay + (start + i) * stride + head * K + c, mask=here, other=0.0)
        total += step.to(before.dtype.element_ty)
        tl.store(before + ((start + i) * heads + head) * K + c, total, mask=here)
    total = tl.zeros([LANES], before.dtype.element_ty)
    for back in range(count):
        i = count - 1 - back
        tl.store(after + ((start + i) * heads + head) * K + c, total, mask=here)
        step = tl.load(log_decay + (start + i) * stride + head * K + c, mask=here, other=0.0)
        total += step.to(before.dtype.element_ty)


@triton.jit
def decay_gradients(
    met, written, carried, gradient, starts, ends, chunks, rows, width,
    MET: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The gradient of each log decay: ``carried + sum_{j < m} written_j + sum_{i >= m} met_i`` within a chunk.

    ``met`` is ``[MET, rows, width]``, ``written`` ``[PARTS, rows, width]`` and ``carried`` ``[PARTS, chunks, width]``,
    summed over the first dimension; ``width`` is the heads, or heads times K. One program per chunk and lanes.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, LANES)
    chunk = pid // blocks
    start, end = tl.load(starts + chunk), tl.load(ends + chunk)
    count = tl.minimum(CHUNK, end - start)
    lane = pid % blocks * LANES + tl.arange(0, LANES)
    here = lane < width
    total = tl.zeros([LANES], met.dtype.element_ty)
    for back in range(count):
        row = start + count - 1 - back
        for part in tl.static_range(MET):
            total += tl.load(met + (part * rows + row) * width + lane, mask=here, other=0.0)
        tl.store(gradient + row * width + lane, total, mask=here)
    tl.debug_barrier()
    total = tl.zeros([LANES], met.dtype.element_ty)
    for part in tl.static_range(PARTS):
        total += tl.load(carried + (part * chunks + chunk) * width + lane, mask=here, other=0.0)
    for i in range(count):
        row = start + i
        later = tl.load(gradient + row * width + lane, mask=here, other=0.0)
        tl.store(gradient + row * width + lane, later + total, mask=here)
        for part in tl.static_range(PARTS):
            total += tl.load(written + (part * rows + row) * width + lane, mask=here, other=0.0)
