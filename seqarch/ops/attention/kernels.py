"""Triton kernels of softmax attention: a program holds a tile of queries, or of keys, and walks over those it meets.

Forward, keys that every query of a tile sees are read without a mask; only the edges of the window and the diagonal
have one. Dao 2023, "FlashAttention-2", section 3; no weight is kept, the backward pass computes them from the
logarithms of their sums.

A few queries, as of a token that is generated, would leave a device idle so: their keys are split among programs, each
with the queries of all heads that share them, and ``softmax.combine`` adds the parts up (Dao et al. 2023,
"Flash-Decoding for long-context inference").

Tokens are counted in 32 bits inside a batch row, or inside the one row of packed sequences; pointers are moved in 64.
``tiles [n, 2]`` holds each tile's sequence and first token, ``bounds [sequences, 4]`` where each sequence's queries and
keys begin and end. Where there is a BIAS, ``bias [B, keys, heads]`` is added to the scores of each key.
"""

# Triton gives Python's syntax another meaning than its types say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from seqarch.ops.triton.softmax import LOG2E, absorb, finish, piece, weights_of
from seqarch.ops.triton.tiles import dot, tile


@triton.jit
def _place(tiles, bounds, key_start, heads, START: tl.constexpr):
    """This program's sequence, tile's first token and head, and the sequence's bounds; the last tiles, which may see
    most, come first."""
    pid = tl.program_id(0)
    number = tl.num_programs(0) // heads - 1 - pid // heads
    sequence = tl.load(tiles + 2 * number)
    first = tl.load(tiles + 2 * number + 1).to(tl.int32)
    place = bounds + 4 * sequence
    begin, end = tl.load(place).to(tl.int32), tl.load(place + 1).to(tl.int32)
    key_begin, key_end = tl.load(place + 2).to(tl.int32), tl.load(place + 3).to(tl.int32)
    if START:  # which may be any number of 64 bits
        key_begin = tl.minimum(tl.maximum(tl.load(key_start + sequence), key_begin), key_end).to(tl.int32)
    return sequence, first, (pid % heads).to(tl.int64), begin, end, key_begin, key_end


@triton.jit
def _keys_of(
    first, last, begin, end, window,
    BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Of queries from position first to last: the keys that some see, and those between that all see, in blocks."""
    low, high, left, right = begin, end, begin, end
    if CAUSAL:
        high, right = tl.minimum(end, last + 1), tl.minimum(end, first + 1)
    if WINDOWED:
        low = tl.maximum(begin, first - window + 1)
        left = tl.maximum(low, last - window + 1)
    left = low + (left - low + BLOCK - 1) // BLOCK * BLOCK
    right = left + tl.maximum(right - left, 0) // BLOCK * BLOCK
    return low, tl.minimum(left, tl.maximum(high, low)), left, right, high


@triton.jit
def _visible(apart, key, end, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Whether a query sees a key that is so far before it."""
    seen = apart >= 0 if CAUSAL else key < end
    if WINDOWED:
        seen = seen & (apart < window)
    return seen


@triton.jit
def _added(bias, there, t, end, heads):
    """What is added to the scores of the keys that begin there, for one head or, in the pointers, several."""
    return tl.load(bias + there.to(tl.int64) * heads + t * heads, mask=t < end - there, other=0.0) * LOG2E


@triton.jit
def attend(
    q, k, v, bias, o, log_sum, tiles, bounds, key_start, scale, window, queries, keys,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, groups, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, START: tl.constexpr, BIAS: tl.constexpr, WORK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``o [B, queries, heads, V]`` and ``log_sum [B, queries, heads]``; one program per tile of BQ queries and head."""
    sequence, first, head, _, query_end, begin, end = _place(tiles, bounds, key_start, heads, START)
    group, count = head // (heads // groups), query_end - first
    q += sequence * q_batch + first.to(tl.int64) * q_row + head * q_head
    k += sequence * k_batch + group * k_head
    v += sequence * v_batch + group * v_head
    bias += sequence * keys * heads + head
    row = (sequence * queries + first) * heads + head
    r, c = tl.arange(0, BQ), tl.arange(0, BK)
    own = piece(q, r[:, None], c[None, :], count, q_row, K, BK, False)
    at = first + end - query_end
    low, near, left, right, high = _keys_of(
        at, at + tl.minimum(count, BQ) - 1, begin, end, window, BT, CAUSAL, WINDOWED
    )
    most, norm = tl.full([BQ], float("-inf"), ACC), tl.zeros([BQ], ACC)
    total = tl.zeros([BQ, BV], ACC)
    if WINDOWED:
        most, norm, total = _attend_keys(
            own, k, v, bias, at + r, most, norm, total, low, near, end, window, scale, k_row, v_row, heads,
            K, V, BK, BV, BT, True, CAUSAL, WINDOWED, BIAS, WORK, PRECISION,
        )  # fmt: skip
    most, norm, total = _attend_keys(
        own, k, v, bias, at + r, most, norm, total, left, right, end, window, scale, k_row, v_row, heads,
        K, V, BK, BV, BT, False, CAUSAL, WINDOWED, BIAS, WORK, PRECISION,
    )  # fmt: skip
    most, norm, total = _attend_keys(
        own, k, v, bias, at + r, most, norm, total, right, high, end, window, scale, k_row, v_row, heads,
        K, V, BK, BV, BT, True, CAUSAL, WINDOWED, BIAS, WORK, PRECISION,
    )  # fmt: skip
    total, sums = finish(most, norm, total)
    column = tl.arange(0, BV)[None, :]
    here = (r[:, None] < count) & (column < V)
    tl.store(o + row * V + r[:, None] * heads * V + column, total.to(o.dtype.element_ty), mask=here)
    tl.store(log_sum + row + r * heads, sums, mask=r < count)


@triton.jit(do_not_specialize=["window", "keys", "parts"])  # they change from token to token
def attend_split(
    q, k, v, bias, o, log_sum, key_start, scale, window, queries, keys, shared, parts, reach,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, groups,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, START: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr,
    WORK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``o [B, queries, groups, parts, shared, V]`` and ``log_sum`` without V; a program holds BQ rows, queries times
    the heads that share a head of keys, and walks over one part of the keys.

    A part is the softmax over its ``reach`` keys alone, a multiple of BT. Its ``log_sum`` is -inf where nothing is
    seen, or 0 if it is the WHOLE.
    """
    pid = tl.program_id(0).to(tl.int64)
    part, group, tiles = pid % parts, pid // parts % groups, tl.cdiv(queries * shared, BQ)
    sequence, r = pid // parts // groups // tiles, (pid // parts // groups % tiles).to(tl.int32) * BQ + tl.arange(0, BQ)
    here, query, head = r < queries * shared, r // shared, group * shared + r % shared
    c, column = tl.arange(0, BK), tl.arange(0, BV)[None, :]
    q += sequence * q_batch + (query.to(tl.int64) * q_row + head * q_head)[:, None]
    own = piece(q, 0, c[None, :], here[:, None].to(tl.int32), 0, K, BK, False)
    heads = groups * shared
    if BIAS:  # a row's own head; rows past the last read what the first does
        bias += sequence * keys * heads + tl.where(here, head, 0)[:, None]
    first = 0
    if START:  # which may be any number of 64 bits
        first = tl.minimum(tl.maximum(tl.load(key_start + sequence), 0), keys).to(tl.int32)
    if WINDOWED:
        first = tl.maximum(first, keys - queries - window + 1)
    start = first + part.to(tl.int32) * reach
    most, norm = tl.full([BQ], float("-inf"), ACC), tl.zeros([BQ], ACC)
    total = tl.zeros([BQ, BV], ACC)
    most, norm, total = _attend_keys(
        own, k + sequence * k_batch + group * k_head, v + sequence * v_batch + group * v_head, bias,
        query + keys - queries, most, norm, total, start, tl.minimum(start + reach, keys), keys, window, scale,
        k_row, v_row, heads, K, V, BK, BV, BT, True, CAUSAL, WINDOWED, BIAS, WORK, PRECISION,
    )  # fmt: skip
    total, sums = finish(most, norm, total)
    if not WHOLE:
        sums = tl.where(norm > 0, sums, float("-inf"))
    place = (((sequence * queries + query) * groups + group) * parts + part) * shared + r % shared
    tl.store(o + place[:, None] * V + column, total.to(o.dtype.element_ty), mask=here[:, None] & (column < V))
    tl.store(log_sum + place, sums, mask=here)


@triton.jit
def _attend_keys(
    own, k, v, bias, position, most, norm, total, start, stop, end, window, scale, k_row, v_row, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BIAS: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax of queries with the keys from start to stop, BT at a time."""
    t, c, column = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    for step in range(0, stop - start, BT):
        there = start + step
        far = there.to(tl.int64)
        keys = piece(k + far * k_row, t[None, :], c[:, None], end - there, k_row, K, BK, not MASKED)
        scores = dot(own, keys, WORK, PRECISION) * (scale * LOG2E)
        if BIAS:
            scores += _added(bias, there, t[None, :], end, heads)
        if MASKED:
            key = there + t[None, :]
            seen = _visible(position[:, None] - key, key, end, window, CAUSAL, WINDOWED)
            scores = tl.where(seen, scores, float("-inf"))
        values = piece(v + far * v_row, t[:, None], column[None, :], end - there, v_row, V, BV, not MASKED)
        most, norm, total = absorb(scores, values, most, norm, total, WORK, PRECISION)
    return most, norm, total


@triton.jit
def query_gradients(
    q, k, v, bias, o, do, log_sum, dlse, dq, between, tiles, bounds, key_start, scale, window, queries, keys,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, do_batch, do_row, do_head, groups, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
    LSE: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, START: tl.constexpr, BIAS: tl.constexpr,
    WORK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dq [B, queries, heads, K]``, and for ``key_gradients`` ``between = do . o``, less ``dlse`` if there is an LSE,
    ``[B, queries, heads]``; a program a tile of BQ queries and head. ``o [B, queries, heads, V]``."""
    sequence, first, head, _, query_end, begin, end = _place(tiles, bounds, key_start, heads, START)
    group, count = head // (heads // groups), query_end - first
    q += sequence * q_batch + first.to(tl.int64) * q_row + head * q_head
    do += sequence * do_batch + first.to(tl.int64) * do_row + head * do_head
    k += sequence * k_batch + group * k_head
    v += sequence * v_batch + group * v_head
    bias += sequence * keys * heads + head
    row = (sequence * queries + first) * heads + head
    r, c, column = tl.arange(0, BQ), tl.arange(0, BK), tl.arange(0, BV)[None, :]
    own = piece(q, r[:, None], c[None, :], count, q_row, K, BK, False)
    upstream = piece(do, r[:, None], column, count, do_row, V, BV, False)
    output = piece(o + row * V, r[:, None], column, count, heads * V, V, BV, False)
    met = tl.sum(upstream.to(ACC) * output.to(ACC), 1)
    if LSE:
        met -= tl.load(dlse + row + r * heads, mask=r < count, other=0.0)
    tl.store(between + row + r * heads, met, mask=r < count)
    sums = tl.load(log_sum + row + r * heads, mask=r < count, other=0.0)
    at = first + end - query_end
    low, _, _, _, high = _keys_of(at, at + tl.minimum(count, BQ) - 1, begin, end, window, BT, CAUSAL, WINDOWED)
    total = tl.zeros([BQ, BK], ACC)
    for step in range(0, high - low, BT):
        there = low + step
        total += _of_keys(
            own, upstream, k, v, bias, at + r, sums, met, there, end, window, scale, k_row, v_row, heads,
            K, V, BK, BV, BT, CAUSAL, WINDOWED, BIAS, WORK, PRECISION,
        )  # fmt: skip
    here = (r[:, None] < count) & (c[None, :] < K)
    total *= scale
    tl.store(dq + row * K + r[:, None] * heads * K + c[None, :], total.to(dq.dtype.element_ty), mask=here)


@triton.jit
def _of_keys(
    own, upstream, k, v, bias, position, sums, met, there, end, window, scale, k_row, v_row, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, BIAS: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The share of the queries' gradients of the BT keys that begin there."""
    t, c, column, count = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV), end - there
    k += there.to(tl.int64) * k_row
    v += there.to(tl.int64) * v_row
    keys = piece(k, t[None, :], c[:, None], count, k_row, K, BK, False)
    scores = dot(own, keys, WORK, PRECISION) * (scale * LOG2E)
    if BIAS:
        scores += _added(bias, there, t[None, :], end, heads)
    key = there + t[None, :]
    seen = _visible(position[:, None] - key, key, end, window, CAUSAL, WINDOWED)
    weights = weights_of(scores, sums[:, None], seen)
    values = piece(v, t[None, :], column[:, None], count, v_row, V, BV, False)
    dscores = weights * (dot(upstream, values, WORK, PRECISION) - met[:, None])
    return dot(dscores, piece(k, t[:, None], c[None, :], count, k_row, K, BK, False), WORK, PRECISION)


@triton.jit
def key_gradients(
    q, k, v, bias, do, log_sum, between, dk, dv, dbias, tiles, bounds, key_start, scale, window, queries, keys,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, do_batch, do_row, do_head, groups, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, START: tl.constexpr, BIAS: tl.constexpr, WORK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dk [B, keys, groups, K]``, ``dv [B, keys, groups, V]`` and, if there is a BIAS, ``dbias [B, keys, heads]``; one
    program per tile of BT keys and head of theirs, with the queries of all heads that share it."""
    sequence, first, group, query_begin, query_end, begin, end = _place(tiles, bounds, key_start, groups, START)
    count, shared = end - first, heads // groups
    k += sequence * k_batch + first.to(tl.int64) * k_row + group * k_head
    v += sequence * v_batch + first.to(tl.int64) * v_row + group * v_head
    q += sequence * q_batch
    do += sequence * do_batch
    log_sum += sequence * queries * heads
    between += sequence * queries * heads
    bias += (sequence * keys + first) * heads
    dbias += (sequence * keys + first) * heads
    t, c, column = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)[None, :]
    own = piece(k, t[:, None], c[None, :], count, k_row, K, BK, False)
    values = piece(v, t[:, None], column, count, v_row, V, BV, False)
    back = query_end - end  # from a position to its query
    low, high = query_begin, query_end
    if CAUSAL:
        low = tl.maximum(query_begin, first + back)
    if WINDOWED:
        high = tl.minimum(query_end, first + BT - 1 + window + back)
    dkeys, dvalues = tl.zeros([BT, BK], ACC), tl.zeros([BT, BV], ACC)
    for head in range(group * shared, (group + 1) * shared):
        added, dadded = tl.zeros([BT], ACC), tl.zeros([BT], ACC)
        if BIAS:
            added = tl.load(bias + t * heads + head, mask=t < count, other=0.0) * LOG2E
        for step in range(0, high - low, BQ):
            more_keys, more_values, more_bias = _of_queries(
                own, values, added, q + head * q_head, do + head * do_head, log_sum + head, between + head, first + t,
                low + step, query_end, back, begin, end, window, scale, q_row, do_row, heads,
                K, V, BK, BV, BQ, CAUSAL, WINDOWED, BIAS, WORK, PRECISION,
            )  # fmt: skip
            dkeys += more_keys
            dvalues += more_values
            if BIAS:
                dadded += more_bias
        if BIAS:
            tl.store(dbias + t * heads + head, dadded, mask=t < count)
    row = (sequence * keys + first) * groups + group
    dkeys *= scale
    here = t[:, None] < count
    tl.store(dk + row * K + t[:, None] * groups * K + c[None, :], dkeys.to(dk.dtype.element_ty),
             mask=here & (c[None, :] < K))  # fmt: skip
    tl.store(dv + row * V + t[:, None] * groups * V + column, dvalues.to(dv.dtype.element_ty), mask=here & (column < V))


@triton.jit
def _of_queries(
    own, values, added, q, do, log_sum, between, key, there, query_end, back, begin, end, window, scale, q_row, do_row,
    heads, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BQ: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, BIAS: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The share of the gradients of keys, values and what is added to scores, of the BQ queries of one head that begin
    there."""
    r, c, column, count = tl.arange(0, BQ), tl.arange(0, BK), tl.arange(0, BV), query_end - there
    far = there.to(tl.int64)
    q += far * q_row
    do += far * do_row
    sums = tile(log_sum + far * heads, r[None, :], 0, count, heads, 1)
    met = tile(between + far * heads, r[None, :], 0, count, heads, 1)
    queries = piece(q, r[None, :], c[:, None], count, q_row, K, BK, False)
    scores = dot(own, queries, WORK, PRECISION) * (scale * LOG2E)
    if BIAS:
        scores += added[:, None]
    apart = (there + r[None, :] - back) - key[:, None]
    seen = _visible(apart, key[:, None], end, window, CAUSAL, WINDOWED) & (key[:, None] >= begin)
    weights = weights_of(scores, sums, seen)
    dvalues = dot(weights, piece(do, r[:, None], column[None, :], count, do_row, V, BV, False), WORK, PRECISION)
    upstream = piece(do, r[None, :], column[:, None], count, do_row, V, BV, False)
    dscores = weights * (dot(values, upstream, WORK, PRECISION) - met)
    dkeys = dot(dscores, piece(q, r[:, None], c[None, :], count, q_row, K, BK, False), WORK, PRECISION)
    return dkeys, dvalues, tl.sum(dscores, 1)
