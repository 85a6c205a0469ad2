"""Functions that Triton kernels of chunked recurrences share: tiles of memory, products, and decay inside a chunk.

A tensor of activations is a matrix of rows, one per token of the whole batch, ``stride`` numbers apart. The pointer
that a function here takes is that of the chunk's first row and the head's first number, moved there in 64 bits; rows
``r`` count from there, up to the ``count`` tokens of the chunk, in 32 bits. A tile is indexed by rows and columns of
two dimensions, ``[R, 1]`` and ``[1, D]``, or ``[1, R]`` and ``[D, 1]`` to read it transposed. Tiles are transposed only
so, as they are read: Triton from 3.4 on gives wrong results on Hopper for products of a product that was transposed in
registers, up to 3.7.0 in flash-linear-attention's issue 640, and in its issue 984 still in 3.7.1.

Every exponent of a decay is a sum of log decays, none of which is positive, and never a difference of long sums:

- one decay per head (``SCALAR``): running sums from the chunk's start in float64, each stored as two float32 numbers
  ``(high, low)``, whose differences keep the digits of a weak decay after a strong one;
- one per key dimension (``VECTOR``): sums from the start of the token's sub-chunk up to and including the token
  (``before``), and of the tokens after it in its sub-chunk (``after``).
"""

# Triton gives Python's syntax another meaning than its types say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
SUB = tl.constexpr(16)
NONE, SCALAR, VECTOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def inside(r, c, count, width):
    """Whether rows and columns exist; either may be a number. Triton's interpreter cannot ``&`` a tile and a number."""
    return c < tl.where(r < count, width, 0)


@triton.jit
def tile(x, r, c, count, stride, width):
    """``x[r, c]``, zero from row ``count`` and from column ``width`` on."""
    return tl.load(x + r * stride + c, mask=inside(r, c, count, width), other=0.0)


@triton.jit
def put(x, value, r, c, count, stride, width):
    """Store a tile in x's dtype."""
    tl.store(x + r * stride + c, value.to(x.dtype.element_ty), mask=inside(r, c, count, width))


@triton.jit
def dot(a, b, WORK: tl.constexpr, PRECISION: tl.constexpr):
    """Matrix product of operands rounded to ``WORK``, summed in float32 (float64 for float64)."""
    if tl.float64 == WORK:
        product = tl.dot(a.to(WORK), b.to(WORK), out_dtype=tl.float64)
    else:
        product = tl.dot(a.to(WORK), b.to(WORK), input_precision=PRECISION)
    return product


@triton.jit
def chunk_bounds(starts, ends, chunk):
    """The first row of a chunk, and how many tokens it has."""
    start = tl.load(starts + chunk)
    return start, tl.minimum(tl.load(ends + chunk) - start, CHUNK).to(tl.int32)


@triton.jit
def lower_triangle(x, i, j, count, stride, STRICT: tl.constexpr):
    """``x[i, j]`` where ``i >= j`` (``>`` if STRICT), else 0."""
    visible = (i > j) if STRICT else (i >= j)
    return tl.load(x + i * stride + j, mask=visible & (i < count), other=0.0)


@triton.jit
def at_head(sums, start, head, heads, width, DECAY: tl.constexpr):
    """Where the sums of a head's decays begin for a chunk, and how far apart rows are."""
    if DECAY == VECTOR:
        return sums + (start * heads + head) * width, heads * width
    else:
        return sums + start * heads + head, heads


@triton.jit
def from_start(first, second, r, c, count, stride, width, DECAY: tl.constexpr, ACC: tl.constexpr):
    """Decay from the chunk's start up to and including each row: 1, of the shape of r, or that of a tile."""
    if DECAY == NONE:
        return tl.full([1, 1], 1.0, ACC)
    elif DECAY == SCALAR:
        return tl.exp(tile(first, r, 0, count, stride, 1) + tile(second, r, 0, count, stride, 1))
    else:
        sums = tile(first, r, c, count, stride, width)
        for s in tl.static_range(SUB, CHUNK, SUB):
            sums += tl.where(r >= s, tile(first, s - 1, c, count, stride, width), 0.0)
        return tl.exp(sums)


@triton.jit
def to_end(first, second, r, c, count, stride, width, DECAY: tl.constexpr, ACC: tl.constexpr):
    """Decay from after each row to the chunk's end: 1, of the shape of r, or that of a tile."""
    if DECAY == NONE:
        return tl.full([1, 1], 1.0, ACC)
    elif DECAY == SCALAR:
        high = tl.load(first + (count - 1) * stride) - tile(first, r, 0, count, stride, 1)
        low = tl.load(second + (count - 1) * stride) - tile(second, r, 0, count, stride, 1)
        return tl.exp(tl.where(r < count, high + low, 0.0))
    else:
        sums = tile(second, r, c, count, stride, width)
        for s in tl.static_range(SUB, CHUNK, SUB):
            last = tl.minimum(s + SUB, count) - 1
            sums += tl.where(r < s, tile(first, last, c, tl.where(s < count, count, 0), stride, width), 0.0)
        return tl.exp(sums)


@triton.jit
def over_chunk(first, second, c, count, stride, width, DECAY: tl.constexpr, ACC: tl.constexpr):
    """Decay over the whole chunk: 1, a number, or of the shape of c."""
    return from_start(first, second, count - 1, c, count, stride, width, DECAY, ACC)


@triton.jit
def between(high, low, r, other, count, stride):
    """``exp(L_r - L_other)`` of one decay per head for ``r >= other``, else 0."""
    visible = (r >= other) & (r < count)
    highs = tile(high, r, 0, count, stride, 1) - tile(high, other, 0, count, stride, 1)
    lows = tile(low, r, 0, count, stride, 1) - tile(low, other, 0, count, stride, 1)
    return tl.where(visible, tl.exp(tl.where(visible, highs + lows, 0.0)), 0.0)
