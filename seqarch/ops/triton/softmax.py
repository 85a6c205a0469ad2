"""Functions that Triton kernels of softmax attention share: tiles at full speed, a softmax that grows key by key, and
its parts.

Scores are in base 2, so that a weight is one ``exp2``. As in ``tiles``, a pointer is that of a tile's first row,
moved there in 64 bits, and tiles are transposed only as they are read.
"""

# Triton gives Python's syntax another meaning than its types say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from seqarch.ops.triton.tiles import dot

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def piece(x, r, c, count, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """``x[r, c]``, with zeros from row ``count`` on unless WHOLE, and from column WIDTH on where BLOCK is wider."""
    place = x + r * stride + c
    if WHOLE and WIDTH == BLOCK:
        return tl.load(place)
    elif WHOLE:
        return tl.load(place, mask=(c < WIDTH) & (r >= 0), other=0.0)
    elif WIDTH == BLOCK:
        return tl.load(place, mask=(r < count) & (c >= 0), other=0.0)
    else:
        return tl.load(place, mask=(r < count) & (c < WIDTH), other=0.0)


@triton.jit
def absorb(scores, values, most, norm, total, WORK: tl.constexpr, PRECISION: tl.constexpr):
    """Further keys for rows of queries: the greatest score, the sum of weights and the weighted sum of values.

    ``scores [Q, T]``, -inf where hidden; ``values [T, V]``; ``most``, ``norm`` ``[Q]``; ``total [Q, V]``.
    """
    highest = tl.maximum(most, tl.max(scores, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(most - base)
    norm = norm * kept + tl.sum(weights, 1)
    total = total * kept[:, None] + dot(weights, values, WORK, PRECISION)
    return highest, norm, total


@triton.jit
def finish(most, norm, total):
    """The softmax's outputs and the logarithms of its sums; 0 for rows that saw nothing."""
    seen = norm > 0
    whole = tl.where(seen, norm, 1.0)
    return total / whole[:, None], tl.where(seen, (most + tl.log2(whole)) / LOG2E, 0.0)


@triton.jit
def weights_of(scores, log_sums, visible):
    """The weights once more, from scores and logarithms of sums that broadcast; never above 1, however scores round."""
    return tl.where(visible, tl.exp2(tl.minimum(scores - log_sums * LOG2E, 0.0)), 0.0)


@triton.jit(do_not_specialize=["count"])  # of parts of keys, whose number changes from token to token
def combine(
    parts, log_sums, entries, out, log_sum, count, shared, heads, scale, out_row, out_head,
    D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, WEIGHTED: tl.constexpr, LISTED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The sum of each row's ``count`` parts, times scale; one program per row, a token's head, PARTS parts at a time.

    ``parts [rows / shared, count, shared, D]``. If LISTED, ``entries [rows / shared, count]`` are negative where there
    is no part. If WEIGHTED, parts count by their share of the softmax, the logarithms of whose sums are ``log_sums``,
    as ``parts`` without D, and ``log_sum [rows]`` gets that of the whole.
    """
    row = tl.program_id(0).to(tl.int64)
    first, head = row // shared * count, row % shared
    column = tl.arange(0, BLOCK)[None, :]
    most, norm = tl.full([1], float("-inf"), ACC), tl.zeros([1], ACC)
    total = tl.zeros([1, BLOCK], ACC)
    for start in range(0, count, PARTS):
        number = start + tl.arange(0, PARTS)
        there = number < count
        if LISTED:
            there = there & (tl.load(entries + first + number, mask=there, other=-1) >= 0)
        place = (first + number) * shared + head
        part = tl.load(parts + place[:, None] * D + column, mask=there[:, None] & (column < D), other=0.0).to(ACC)
        if WEIGHTED:
            score = tl.load(log_sums + place, mask=there, other=float("-inf")) * LOG2E
            highest = tl.maximum(most, tl.max(score, 0))
            base = tl.where(highest == float("-inf"), 0.0, highest)
            weight, kept = tl.exp2(score - base), tl.exp2(most - base)
            norm = norm * kept + tl.sum(weight, 0)
            total = total * kept[:, None] + tl.sum(weight[:, None] * part, 0)[None, :]
            most = highest
        else:
            total += tl.sum(part, 0)[None, :]
    if WEIGHTED:
        total, sums = finish(most, norm, total)
        tl.store(log_sum + row + tl.arange(0, 1), sums)
    place = out + (row // heads * out_row + row % heads * out_head) + column
    tl.store(place, (total * scale).to(out.dtype.element_ty), mask=column < D)
