"""Triton kernels of chunked recurrences with a matrix state: states, outputs, and the gradients of queries and keys.

Each serves two directions. Forward, a state is carried to the right by what keys write, ``S' = over S + to_end(k)^T w``
and read by queries, ``o = scores w + from_start(q) S``. Backward, its gradient is carried to the left by what queries
read, ``dS' = over dS + from_start(q)^T do``, and met by keys, ``dw = scores^T do + to_end(k) dS``.
"""

# Triton gives Python's syntax another meaning than its types say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from seqarch.ops.triton.tiles import (
    CHUNK,
    NONE,
    SCALAR,
    VECTOR,
    at_head,
    between,
    chunk_bounds,
    dot,
    from_start,
    lower_triangle,
    over_chunk,
    put,
    tile,
    to_end,
)


@triton.jit
def states(
    x, w, first, second, initial, out, last, starts, ends, sequences, scale, x_stride, w_stride, groups, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BACKWARD: tl.constexpr,
    DECAY: tl.constexpr, WORK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward, the state before each chunk from keys x and values w; backward, the gradient of the state after each
    chunk from queries x and the outputs' gradients w. One program per sequence, head and tile of the state.

    ``out [chunks, heads, K, V]``; ``initial`` and ``last`` ``[sequences, heads, K, V]``.
    """
    pid = tl.program_id(0).to(tl.int64)
    value_blocks: tl.constexpr = tl.cdiv(V, BV)
    blocks: tl.constexpr = tl.cdiv(K, BK) * value_blocks
    block, head, sequence = pid % blocks, pid // blocks % heads, pid // blocks // heads
    c = (block // value_blocks * BK + tl.arange(0, BK))[:, None]
    v = (block % value_blocks * BV + tl.arange(0, BV))[None, :]
    x += head // (heads // groups) * K
    w += head * V
    r = tl.arange(0, CHUNK)
    state = tile(initial + (sequence * heads + head) * K * V, c, v, K, V, V).to(ACC)
    begin, stop = tl.load(sequences + sequence), tl.load(sequences + sequence + 1)
    for step in range(stop - begin):
        chunk = (stop - 1 - step) if BACKWARD else (begin + step)
        put(out + (chunk * heads + head) * K * V, state, c, v, K, V, V)
        start, count = chunk_bounds(starts, ends, chunk)
        near, stride = at_head(first, start, head, heads, K, DECAY)
        rest, stride = at_head(second, start, head, heads, K, DECAY)
        if BACKWARD:
            factor = from_start(near, rest, r[None, :], c, count, stride, K, DECAY, ACC)
        else:
            factor = to_end(near, rest, r[None, :], c, count, stride, K, DECAY, ACC)
        rows = tile(x + start * x_stride, r[None, :], c, count, x_stride, K) * factor * scale
        state *= over_chunk(near, rest, c, count, stride, K, DECAY, ACC)
        state += dot(rows, tile(w + start * w_stride, r[:, None], v, count, w_stride, V), WORK, PRECISION)
    put(last + (sequence * heads + head) * K * V, state, c, v, K, V, V)


@triton.jit
def outputs(
    x, w, scores, first, second, states, out, starts, ends, scale, x_stride, w_stride, groups, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BACKWARD: tl.constexpr,
    CARRIED: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, WORK: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward ``scores w + from_start(x) S``, backward ``scores^T w + to_end(x) S``; without the states if not CARRIED.
    ``out [rows, heads, V]``; one program per chunk, head and block of V."""
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = tl.cdiv(V, BV)
    block, head, chunk = pid % blocks, pid // blocks % heads, pid // blocks // heads
    start, count = chunk_bounds(starts, ends, chunk)
    x += start * x_stride + head // (heads // groups) * K
    w += start * w_stride + head * V
    scores += (start * heads + head) * CHUNK
    states += (chunk * heads + head) * K * V
    first, stride = at_head(first, start, head, heads, K, DECAY)
    second, stride = at_head(second, start, head, heads, K, DECAY)
    r, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    v = (block * BV + tl.arange(0, BV))[None, :]
    if BACKWARD:
        met = lower_triangle(scores, other, r, count, heads * CHUNK, STRICT)
    else:
        met = lower_triangle(scores, r, other, count, heads * CHUNK, STRICT)
    total = dot(met, tile(w, r, v, count, w_stride, V), WORK, PRECISION)
    if CARRIED:
        for k in tl.static_range(0, K, BK):
            c = k + tl.arange(0, BK)
            if BACKWARD:
                factor = to_end(first, second, r, c[None, :], count, stride, K, DECAY, ACC)
            else:
                factor = from_start(first, second, r, c[None, :], count, stride, K, DECAY, ACC)
            rows = tile(x, r, c[None, :], count, x_stride, K) * factor * scale
            total += dot(rows, tile(states, c[:, None], v, K, V, V), WORK, PRECISION)
    put(out + (start * heads + head) * V, total, r, v, count, heads * V, V)


@triton.jit
def gradients(
    x, y, w, dscores, first, second, states, others, dx, met, written, carried, starts, ends, chunks, rows, scale,
    x_stride, y_stride, w_stride, groups, heads, shared,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BACKWARD: tl.constexpr,
    CARRIED: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, WORK: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of queries x, ``from_start (w S^T) + dscores y``, w being the gradients of the outputs; BACKWARD of
    keys x, ``to_end (w dS^T) + dscores^T y``, w being the values. Without the states if not CARRIED; with one decay
    per key dimension without the scores, which ``vector_score_gradients`` adds. One program per chunk, ``shared`` heads
    that lie together and block of K. For ``decay_gradients``, with one decay per head a part per block of K: what
    queries met; if BACKWARD minus what keys met in their own chunk, what they wrote, and what the chunk hands on.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = tl.cdiv(K, BK)
    few = heads // shared
    block, part, chunk = pid % blocks, pid // blocks % few, pid // blocks // few
    start, count = chunk_bounds(starts, ends, chunk)
    r = tl.arange(0, CHUNK)[:, None]
    c = (block * BK + tl.arange(0, BK))[None, :]
    group = part * shared // (heads // groups)
    x += start * x_stride + group * K
    y += start * y_stride + group * K
    if DECAY == SCALAR:
        met += block * rows * heads
        written += block * rows * heads
        carried += block * chunks * heads
    total = tl.zeros([CHUNK, BK], ACC)
    for head in range(part * shared, (part + 1) * shared):
        near, stride = at_head(first, start, head, heads, K, DECAY)
        rest, stride = at_head(second, start, head, heads, K, DECAY)
        here, row = (chunk * heads + head) * K * V, start * heads + head
        crossed = tl.zeros([CHUNK, BK], ACC)
        if CARRIED:
            share = _from_states(
                w + start * w_stride + head * V, states + here, near, rest, r, c, count, w_stride, stride, scale,
                K, V, BV, BACKWARD, DECAY, WORK, ACC, PRECISION,
            )  # fmt: skip
            total += share
            crossed = share * tile(x, r, c, count, x_stride, K)
        if CARRIED and BACKWARD:
            _put_decay_terms(written, crossed, row, r, c, count, heads, K, DECAY)
            _put_carried(
                carried, states + here, others + here, near, rest, chunk * heads + head, c, count, stride, heads,
                K, V, BV, DECAY, ACC,
            )  # fmt: skip
            crossed = tl.zeros([CHUNK, BK], ACC)
        if DECAY != VECTOR:
            scores, other = dscores + row * CHUNK, tile(y, r, c, count, y_stride, K)
            share = scale * _from_scores(
                scores, other, near, rest, r, count, heads * CHUNK, stride, BACKWARD, DECAY, WORK, PRECISION
            )
            total += share
            share *= tile(x, r, c, count, x_stride, K)
            crossed += -share if BACKWARD else share
            if not STRICT:
                total += tile(scores, r, r, count, heads * CHUNK, CHUNK).to(ACC) * scale * other
        if (DECAY != VECTOR) or (not BACKWARD):
            _put_decay_terms(met, crossed, row, r, c, count, heads, K, DECAY)
    put(dx + (start * few + part) * K, total, r, c, count, few * K, K)


@triton.jit
def _from_states(
    w, states, first, second, r, c, count, w_stride, stride, scale,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BACKWARD: tl.constexpr,
    DECAY: tl.constexpr, WORK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states' share of the gradients: of queries ``scale from_start (w S^T)``, BACKWARD of keys ``to_end (w
    dS^T)``."""
    total = tl.zeros([CHUNK, c.shape[1]], ACC)
    for v in range(0, V, BV):
        column = v + tl.arange(0, BV)
        state = tile(states, c, column[:, None], K, V, V)
        total += dot(tile(w, r, column[None, :], count, w_stride, V), state, WORK, PRECISION)
    if BACKWARD:
        total *= to_end(first, second, r, c, count, stride, K, DECAY, ACC)
    else:
        total *= from_start(first, second, r, c, count, stride, K, DECAY, ACC) * scale
    return total


@triton.jit
def _put_carried(
    out, states, others, first, second, row, c, count, stride, heads,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store ``over S . dS`` per key dimension, or summed over those of a head."""
    if DECAY != NONE:
        total = tl.zeros([1, c.shape[1]], ACC)
        for v in range(0, V, BV):
            column = (v + tl.arange(0, BV))[:, None]
            total += tl.sum(tile(states, c, column, K, V, V).to(ACC) * tile(others, c, column, K, V, V), 0)[None, :]
        total *= over_chunk(first, second, c, count, stride, K, DECAY, ACC)
        _put_decay_terms(out, total, row, tl.arange(0, 1)[:, None], c, 1, heads, K, DECAY)


@triton.jit
def _from_scores(
    dscores, rows, first, second, r, count, down, stride,
    ACROSS: tl.constexpr, DECAY: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores' share of the gradients, different tokens alone: of queries from keys, ACROSS of keys from queries."""
    other = tl.arange(0, CHUNK)[None, :]
    i, j = (other, r) if ACROSS else (r, other)
    met = lower_triangle(dscores, i, j, count, down, True)
    if DECAY == SCALAR:
        met = met * between(first, second, i, j, count, stride)
    return dot(met, rows, WORK, PRECISION)


@triton.jit
def _put_decay_terms(out, value, row, r, c, count, heads, K: tl.constexpr, DECAY: tl.constexpr):
    """Store terms of the decays' gradient: per key dimension, or summed over those of a head."""
    if DECAY == VECTOR:
        put(out + row * K, value, r, c, count, heads * K, K)
    elif DECAY == SCALAR:
        put(out + row, tl.sum(value, 1)[:, None], r, tl.arange(0, 1)[None, :], count, heads, 1)
