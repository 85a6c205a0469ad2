"""Triton kernels of the delta rule beyond those that it shares with linear attention.

A chunk's corrected values solve ``(I + M) u = beta (v - from_start(read) S)`` with ``M[i, j] = beta_i scores[i, j]``,
``i > j``. With ``inverse = (I + M)^-1``, ``recall = inverse (beta from_start(read))`` and ``inverse (beta v)`` are
known before the state is (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", section 3.2).
"""

# Triton gives Python's syntax another meaning than its types say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from seqarch.ops.triton.tiles import (
    CHUNK,
    SUB,
    at_head,
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
def invert(
    scores, beta, out, starts, ends, beta_stride, heads,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``(I + M)^-1``, ``[rows, heads, CHUNK]``, its lower triangle written; one program per chunk and head.

    Diagonal blocks of SUB tokens by substitution, row after row; then the inverse of two neighbours,
    ``[[A, 0], [B, C]]``, from theirs, as ``-C^-1 B A^-1`` below the diagonal, until the blocks are the chunk. No power
    of M is formed.
    """
    pid = tl.program_id(0).to(tl.int64)
    head, chunk = pid % heads, pid // heads
    start, count = chunk_bounds(starts, ends, chunk)
    scores += (start * heads + head) * CHUNK
    out += (start * heads + head) * CHUNK
    beta += start * beta_stride + head
    down = heads * CHUNK
    piece = tl.arange(0, CHUNK // SUB)[:, None, None]
    i, j = tl.arange(0, SUB)[None, :, None], tl.arange(0, SUB)[None, None, :]
    r = piece * SUB + i
    blocks = -lower_triangle(scores, r, piece * SUB + j, count, down, True).to(ACC)
    blocks *= tile(beta, r, 0, count, beta_stride, 1)
    for t in range(1, SUB):
        row = tl.sum(tl.where(i == t, blocks, 0.0), 1)
        row += tl.sum(row[:, :, None] * blocks, 1)
        blocks = tl.where(i == t, row[:, None, :], blocks)
    blocks = tl.where(i == j, 1.0, blocks)
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    spread = tl.broadcast_to(blocks.reshape(CHUNK, 1, SUB), (CHUNK, CHUNK // SUB, SUB)).reshape(CHUNK, CHUNK)
    inverse = tl.where(row // SUB == column // SUB, spread, 0.0)
    system = lower_triangle(scores, row, column, count, down, True).to(ACC) * tile(beta, row, 0, count, beta_stride, 1)
    inverse = _merge(inverse, system, row, column, SUB, ACC, PRECISION)
    inverse = _merge(inverse, system, row, column, 2 * SUB, ACC, PRECISION)
    tl.store(out + row * down + column, inverse.to(out.dtype.element_ty), mask=(row >= column) & (row < count))


@triton.jit
def _merge(inverse, system, row, column, SIZE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """From the inverses of diagonal blocks of this size those of blocks twice as large."""
    below = (row // (2 * SIZE) == column // (2 * SIZE)) & (row // SIZE > column // SIZE)
    solved = dot(inverse, tl.where(below, system, 0.0), ACC, PRECISION)
    return inverse - dot(solved, inverse, ACC, PRECISION)


@triton.jit
def solve(
    inverse, x, beta, first, second, out, starts, ends, x_stride, beta_stride, groups, heads,
    D: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr, WORK: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``inverse (beta from_start(x))``, ``[rows, heads, D]``; one program per chunk, head and block of D."""
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = tl.cdiv(D, BLOCK)
    block, head, chunk = pid % blocks, pid // blocks % heads, pid // blocks // heads
    start, count = chunk_bounds(starts, ends, chunk)
    r, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    c = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
    first, stride = at_head(first, start, head, heads, D, DECAY)
    second, stride = at_head(second, start, head, heads, D, DECAY)
    factor = from_start(first, second, r, c, count, stride, D, DECAY, ACC)
    factor *= tile(beta + start * beta_stride + head, r, 0, count, beta_stride, 1)
    x += start * x_stride + head // (heads // groups) * D
    left = lower_triangle(inverse + (start * heads + head) * CHUNK, r, other, count, heads * CHUNK, False)
    right = tile(x, r, c, count, x_stride, D) * factor
    put(out + (start * heads + head) * D, dot(left, right, WORK, PRECISION), r, c, count, heads * D, D)


@triton.jit
def corrected_states(
    k, recall, w, first, second, initial, out, u, last, starts, ends, sequences, k_stride, groups, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, WORK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each chunk, and the corrected values ``u = w - recall S``; one program per sequence, head and
    block of V. ``w``, ``u``: ``[rows, heads, V]``; ``BK >= K``."""
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = tl.cdiv(V, BV)
    block, head, sequence = pid % blocks, pid // blocks % heads, pid // blocks // heads
    c, r = tl.arange(0, BK), tl.arange(0, CHUNK)
    v = (block * BV + tl.arange(0, BV))[None, :]
    k += head // (heads // groups) * K
    state = tile(initial + (sequence * heads + head) * K * V, c[:, None], v, K, V, V).to(ACC)
    for chunk in range(tl.load(sequences + sequence), tl.load(sequences + sequence + 1)):
        put(out + (chunk * heads + head) * K * V, state, c[:, None], v, K, V, V)
        start, count = chunk_bounds(starts, ends, chunk)
        near, stride = at_head(first, start, head, heads, K, DECAY)
        rest, stride = at_head(second, start, head, heads, K, DECAY)
        row = start * heads + head
        values = tile(w + row * V, r[:, None], v, count, heads * V, V).to(ACC)
        values -= dot(tile(recall + row * K, r[:, None], c[None, :], count, heads * K, K), state, WORK, PRECISION)
        put(u + row * V, values, r[:, None], v, count, heads * V, V)
        factor = to_end(near, rest, r[None, :], c[:, None], count, stride, K, DECAY, ACC)
        keys = tile(k + start * k_stride, r[None, :], c[:, None], count, k_stride, K) * factor
        state *= over_chunk(near, rest, c[:, None], count, stride, K, DECAY, ACC)
        state += dot(keys, values, WORK, PRECISION)
    put(last + (sequence * heads + head) * K * V, state, c[:, None], v, K, V, V)


@triton.jit
def corrected_gradients(
    q, k, recall, do, w, first, second, final, out, du, dinitial, starts, ends, sequences, scale, q_stride,
    k_stride, do_stride, groups, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, WORK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each chunk, and of the corrected values, ``du = w + to_end(k) dS``, w being what
    they get from queries of their own chunk; one program per sequence, head and block of V. ``BK >= K``."""
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = tl.cdiv(V, BV)
    block, head, sequence = pid % blocks, pid // blocks % heads, pid // blocks // heads
    c, r = tl.arange(0, BK), tl.arange(0, CHUNK)
    v = (block * BV + tl.arange(0, BV))[None, :]
    q += head // (heads // groups) * K
    k += head // (heads // groups) * K
    do += head * V
    state = tile(final + (sequence * heads + head) * K * V, c[:, None], v, K, V, V).to(ACC)
    begin, stop = tl.load(sequences + sequence), tl.load(sequences + sequence + 1)
    for step in range(stop - begin):
        chunk = stop - 1 - step
        put(out + (chunk * heads + head) * K * V, state, c[:, None], v, K, V, V)
        start, count = chunk_bounds(starts, ends, chunk)
        near, stride = at_head(first, start, head, heads, K, DECAY)
        rest, stride = at_head(second, start, head, heads, K, DECAY)
        row = start * heads + head
        factor = to_end(near, rest, r[:, None], c[None, :], count, stride, K, DECAY, ACC)
        keys = tile(k + start * k_stride, r[:, None], c[None, :], count, k_stride, K) * factor
        values = tile(w + row * V, r[:, None], v, count, heads * V, V).to(ACC) + dot(keys, state, WORK, PRECISION)
        put(du + row * V, values, r[:, None], v, count, heads * V, V)
        factor = from_start(near, rest, r[None, :], c[:, None], count, stride, K, DECAY, ACC) * scale
        queries = tile(q + start * q_stride, r[None, :], c[:, None], count, q_stride, K) * factor
        known = tile(recall + row * K, r[None, :], c[:, None], count, heads * K, K)
        state *= over_chunk(near, rest, c[:, None], count, stride, K, DECAY, ACC)
        state += dot(queries, tile(do + start * do_stride, r[:, None], v, count, do_stride, V), WORK, PRECISION)
        state -= dot(known, values, WORK, PRECISION)
    put(dinitial + (sequence * heads + head) * K * V, state, c[:, None], v, K, V, V)


@triton.jit
def value_gradients(
    inverse, scores, u, du, v, beta, read, first, second, states, z, dbeta, starts, ends, v_stride, beta_stride,
    read_stride, groups, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, WORK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``z = -beta y`` and ``dbeta = y . (v - recalled)`` with ``y = inverse^T du`` and what each token recalls,
    ``scores u + from_start(read) S``; one program per chunk and head."""
    pid = tl.program_id(0).to(tl.int64)
    head, chunk = pid % heads, pid // heads
    start, count = chunk_bounds(starts, ends, chunk)
    row = start * heads + head
    read += start * read_stride + head // (heads // groups) * K
    states += (chunk * heads + head) * K * V
    first, stride = at_head(first, start, head, heads, K, DECAY)
    second, stride = at_head(second, start, head, heads, K, DECAY)
    r, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    betas = tile(beta + start * beta_stride + head, r, 0, count, beta_stride, 1).to(ACC)
    total = tl.zeros([CHUNK, 1], ACC)
    for value in range(0, V, BV):
        columns = (value + tl.arange(0, BV))[None, :]
        across = lower_triangle(inverse + row * CHUNK, other, r, count, heads * CHUNK, False)
        y = dot(across, tile(du + row * V, r, columns, count, heads * V, V), WORK, PRECISION)
        put(z + row * V, -y * betas, r, columns, count, heads * V, V)
        met = lower_triangle(scores + row * CHUNK, r, other, count, heads * CHUNK, True)
        recalled = dot(met, tile(u + row * V, r, columns, count, heads * V, V), WORK, PRECISION)
        for key in range(0, K, BK):
            c = key + tl.arange(0, BK)
            factor = from_start(first, second, r, c[None, :], count, stride, K, DECAY, ACC)
            reads = tile(read, r, c[None, :], count, read_stride, K) * factor
            recalled += dot(reads, tile(states, c[:, None], columns, K, V, V), WORK, PRECISION)
        error = tile(v + start * v_stride + head * V, r, columns, count, v_stride, V) - recalled
        total += tl.sum(y * error, 1)[:, None]
    put(dbeta + start * heads + head, total, r, tl.arange(0, 1)[None, :], count, heads, 1)
