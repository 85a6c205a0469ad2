"""Triton kernels for the scores of a chunk, ``scores[i, j] = scale x_i . (exp(L_i - L_j) y_j)``, and their gradients.

A head's scores are ``[rows, heads, CHUNK]``: the row of token i, the place of token j in its chunk. Entries that
causality excludes are not written; who reads masks them. With one decay per key dimension, tokens of one sub-chunk meet
one by one, under a running product of single decays, and tokens of different sub-chunks in matrix products about the
start of the later one.
"""

# Triton gives Python's syntax another meaning than its types say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from seqarch.ops.triton.tiles import (
    CHUNK,
    SCALAR,
    SUB,
    VECTOR,
    at_head,
    between,
    chunk_bounds,
    dot,
    inside,
    tile,
)


@triton.jit
def scores(
    x, y, first, second, out, starts, ends, scale, x_stride, y_stride, x_heads, y_heads, heads,
    D: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr, STRICT: tl.constexpr, WORK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """No decay, or one per head; one program per chunk and head. ``x``, ``y``: ``[rows, x_heads or y_heads, D]``."""
    pid = tl.program_id(0).to(tl.int64)
    head, chunk = pid % heads, pid // heads
    start, count = chunk_bounds(starts, ends, chunk)
    x += start * x_stride + head // (heads // x_heads) * D
    y += start * y_stride + head // (heads // y_heads) * D
    token = tl.arange(0, CHUNK)
    i, j = token[:, None], token[None, :]
    total = tl.zeros([CHUNK, CHUNK], ACC)
    for d in tl.static_range(0, D, BLOCK):
        c = d + tl.arange(0, BLOCK)
        left, right = tile(x, i, c[None, :], count, x_stride, D), tile(y, j, c[:, None], count, y_stride, D)
        total += dot(left, right, WORK, PRECISION)
    total *= scale
    if DECAY == SCALAR:
        first, stride = at_head(first, start, head, heads, D, DECAY)
        second, stride = at_head(second, start, head, heads, D, DECAY)
        total *= between(first, second, i, j, count, stride)
    visible = (i > j) if STRICT else (i >= j)
    place = out + (start * heads + head) * CHUNK + i * heads * CHUNK + j
    tl.store(place, total.to(out.dtype.element_ty), mask=visible & (i < count))


@triton.jit
def vector_scores(
    x, y, log_decay, before, after, out, starts, ends, scale, x_stride, y_stride, decay_stride, groups, heads,
    K: tl.constexpr, BLOCK: tl.constexpr, STRICT: tl.constexpr, WORK: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One decay per key dimension; one program per sub-chunk of tokens i and a head. ``BLOCK >= K``."""
    pid = tl.program_id(0).to(tl.int64)
    head, piece = pid % heads, pid // heads
    own = (piece % (CHUNK // SUB)).to(tl.int32) * SUB
    start, count = chunk_bounds(starts, ends, piece // (CHUNK // SUB))
    x += start * x_stride + head // (heads // groups) * K
    y += start * y_stride + head // (heads // groups) * K
    log_decay += start * decay_stride + head * K
    before, wide = at_head(before, start, head, heads, K, VECTOR)
    after, wide = at_head(after, start, head, heads, K, VECTOR)
    out += (start * heads + head) * CHUNK
    token, c = tl.arange(0, SUB), tl.arange(0, BLOCK)
    i, r = token[:, None], own + token[:, None]
    queries = tile(x, r, c[None, :], count, x_stride, K).to(ACC) * scale
    since = queries * tl.exp(tile(before, r, c[None, :], count, wide, K))
    skipped = tl.zeros([BLOCK, 1], ACC)
    for back in range(SUB, own + 1, SUB):
        there = own - back
        other = there + token[None, :]
        until = tl.exp(tile(after, other, c[:, None], count, wide, K) + skipped)
        met = dot(since, tile(y, other, c[:, None], count, y_stride, K) * until, WORK, PRECISION)
        tl.store(out + r * heads * CHUNK + other, met.to(out.dtype.element_ty), mask=r < count)
        skipped += tile(before, there + SUB - 1, c[:, None], count, wide, K)
    near, kept = tl.zeros([SUB, SUB], ACC), tl.zeros([SUB, BLOCK], ACC)
    mine = tl.minimum(SUB, count - own)
    for back in range(mine):
        j = mine - 1 - back
        kept = _one_earlier(kept, log_decay, i, j, own, c[None, :], count, decay_stride, K, ACC)
        met = tl.sum(queries * kept * tile(y, own + j, c[None, :], count, y_stride, K), 1)
        near = tl.where(token[None, :] == j, met[:, None], near)
    visible = (i > token[None, :]) if STRICT else (i >= token[None, :])
    place = out + r * heads * CHUNK + own + token[None, :]
    tl.store(place, near.to(out.dtype.element_ty), mask=visible & (r < count))


@triton.jit
def _one_earlier(kept, log_decay, i, j, own, c, count, stride, K: tl.constexpr, ACC: tl.constexpr):
    """From the decays between token ``j + 1`` of a sub-chunk and each token i, 0 for earlier ones, those from j on."""
    step = tl.exp(tile(log_decay, own + j + 1, c, count, stride, K).to(ACC))
    return tl.where(i == j, 1.0, tl.where(i > j, kept * step, 0.0))


@triton.jit
def vector_score_gradients(
    x, y, log_decay, before, after, dscores, dx, dy, met, starts, ends, scale, x_stride, y_stride, decay_stride,
    groups, heads,
    K: tl.constexpr, BLOCK: tl.constexpr, STRICT: tl.constexpr, WORK: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the scores' share to ``dx``, ``dy`` and ``met``, ``[rows, heads, K]`` each; one program per sub-chunk and
    head.

    ``met`` is ``x dx - y dy`` without the scores of a token with itself, between which there is no decay.
    """
    pid = tl.program_id(0).to(tl.int64)
    head, piece = pid % heads, pid // heads
    own = (piece % (CHUNK // SUB)).to(tl.int32) * SUB
    start, count = chunk_bounds(starts, ends, piece // (CHUNK // SUB))
    x += start * x_stride + head // (heads // groups) * K
    y += start * y_stride + head // (heads // groups) * K
    log_decay += start * decay_stride + head * K
    before, wide = at_head(before, start, head, heads, K, VECTOR)
    after, wide = at_head(after, start, head, heads, K, VECTOR)
    dscores += (start * heads + head) * CHUNK
    far, i, c = heads * CHUNK, tl.arange(0, SUB)[:, None], tl.arange(0, BLOCK)[None, :]
    r = own + i
    queries = tile(x, r, c, count, x_stride, K).to(ACC) * scale
    keys = tile(y, r, c, count, y_stride, K).to(ACC)
    dqueries = _earlier(y, before, after, dscores, c, own, count, wide, far, y_stride, K, WORK, ACC, PRECISION)
    dkeys = _later(x, before, after, dscores, c, own, count, wide, far, x_stride, K, WORK, ACC, PRECISION) * scale
    kept = tl.zeros([SUB, BLOCK], ACC)
    mine = tl.minimum(SUB, count - own)
    for back in range(mine):
        j = mine - 1 - back
        kept = _one_earlier(kept, log_decay, i, j, own, c, count, decay_stride, K, ACC)
        share = tl.where(i > j, tile(dscores, r, own + j, count, far, CHUNK) * kept, 0.0)
        dqueries += share * tile(y, own + j, c, count, y_stride, K)
        dkeys = tl.where(i == j, dkeys + tl.sum(share * queries, 0)[None, :], dkeys)
    place = start * wide + head * K + r * wide + c
    here = inside(r, c, count, K)
    crossed = queries * dqueries - keys * dkeys
    tl.store(met + place, tl.load(met + place, mask=here, other=0.0) + crossed, mask=here)
    if not STRICT:
        itself = tile(dscores, r, r, count, far, CHUNK)
        dqueries += itself * keys
        dkeys += itself * queries
    tl.store(dx + place, tl.load(dx + place, mask=here, other=0.0) + dqueries * scale, mask=here)
    tl.store(dy + place, tl.load(dy + place, mask=here, other=0.0) + dkeys, mask=here)


@triton.jit
def _earlier(
    y, before, after, dscores, c, own, count, wide, far, y_stride,
    K: tl.constexpr, WORK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The share of a sub-chunk's query gradients of the keys of earlier ones."""
    token = tl.arange(0, SUB)
    total, skipped = tl.zeros([SUB, c.shape[1]], ACC), tl.zeros([1, c.shape[1]], ACC)
    for back in range(SUB, own + 1, SUB):
        there = own - back
        other = there + token[:, None]
        until = tl.exp(tile(after, other, c, count, wide, K) + skipped)
        met = tile(dscores, own + token[:, None], there + token[None, :], count, far, CHUNK)
        total += dot(met, tile(y, other, c, count, y_stride, K) * until, WORK, PRECISION)
        skipped += tile(before, there + SUB - 1, c, count, wide, K)
    return total * tl.exp(tile(before, own + token[:, None], c, count, wide, K))


@triton.jit
def _later(
    x, before, after, dscores, c, own, count, wide, far, x_stride,
    K: tl.constexpr, WORK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The share of a sub-chunk's key gradients of the queries of later ones."""
    token = tl.arange(0, SUB)
    total = tl.zeros([SUB, c.shape[1]], ACC)
    until = tile(after, own + token[:, None], c, count, wide, K)
    for there in range(own + SUB, count, SUB):
        other = there + token[:, None]
        since = tl.exp(tile(before, other, c, count, wide, K))
        met = tile(dscores, there + token[None, :], own + token[:, None], count, far, CHUNK)
        total += tl.exp(until) * dot(met, tile(x, other, c, count, x_stride, K) * since, WORK, PRECISION)
        until += tile(before, tl.minimum(there + SUB, count) - 1, c, count, wide, K)
    return total
