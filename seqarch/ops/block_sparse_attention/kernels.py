"""Triton kernels of attention over listed blocks: a tile is a block of keys and some of the queries that list it.

A *pair* is an entry of a query's list: pair ``((b Tq + query) I + list) S + slot``. ``order`` names the pairs sorted by
the block of keys that they name, whichever list of a head of keys they are of; ``tiles`` holds where each tile begins
in that order, ``runs`` where each block does, both with one more place for the end, and ``ends`` how many there are.
Rows of a tile are pairs times the ``shared`` heads of a list, so a tile is as full with one head per list as with many.
Programs take every so many-th tile: how many there are depends on the data, and nobody waits to learn it.

Each pair has outputs and a logarithm of its sum of its own, which ``softmax.combine`` adds up, always in the
same order. For one query per row, pairs keep their order, and a tile is a pair; what is no block is then a tile that
sees nothing.
"""

# Triton gives Python's syntax another meaning than its types say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from seqarch.ops.triton.softmax import LOG2E, absorb, finish, piece, weights_of
from seqarch.ops.triton.tiles import dot


@triton.jit
def _block(order, entries, first, begin, first_row, queries, listed, lists, groups, block_size):
    """Of the block that the pair at a place in the order names: the row of the batch, the head and the first key.

    Of a pair that names none: the first key of the sequence.
    """
    pair = tl.load(order + begin)
    token, list_ = pair // listed // lists, pair // listed % lists
    row, number = token // queries, tl.maximum(tl.load(entries + pair), 0) >> 1
    start = tl.load(first + row * first_row + token % queries) + number * block_size
    return row, list_ // (lists // groups), start


@triton.jit
def _pairs(order, entries, begin, end, r, keys, queries, listed, lists, shared):
    """Of rows r, pairs times heads: the pairs, tokens, heads, positions, whether only the window sees, and which exist
    and name a block.

    Tokens are counted through the batch; places that do not exist stand for the first pair.
    """
    here = r < (end - begin) * shared
    pair = tl.load(order + begin + tl.where(here, r // shared, 0))
    token, list_ = pair // listed // lists, pair // listed % lists
    head = list_ * shared + r % shared
    at = (token % queries + keys - queries).to(tl.int32)
    entry = tl.load(entries + pair)
    return pair, token, head, at, (entry & 1) == 1, here & (entry >= 0)


@triton.jit
def _seen(at, key, near, here, end, window):
    """Which keys a pair sees; all broadcast."""
    return here & (key <= at) & (key < end) & ((at - key < window) | (near == 0))


@triton.jit(do_not_specialize=["window", "keys"])  # they change from token to token
def partial_outputs(
    q, k, v, o, log_sum, order, entries, first, tiles, ends, scale, window, first_row, queries, keys, listed, lists,
    groups, shared, block_size, parts,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
    WORK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each pair and head the softmax's output over its block alone, ``[pairs, shared, V]``, and the logarithm of the
    sum, ``[pairs, shared]``, -inf where nothing is seen; each tile's rows in so many parts of BQ."""
    c, column, t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    for item in range(tl.program_id(0), tl.load(ends) * parts, tl.num_programs(0)):
        begin, end = tl.load(tiles + item // parts), tl.load(tiles + item // parts + 1)
        row, group, start = _block(order, entries, first, begin, first_row, queries, listed, lists, groups, block_size)
        r = item % parts * BQ + tl.arange(0, BQ)
        pair, token, head, at, near, here = _pairs(order, entries, begin, end, r, keys, queries, listed, lists, shared)
        own = q + row * q_batch + (token % queries * q_row + head * q_head)[:, None]
        rows = piece(own, 0, c[None, :], here[:, None].to(tl.int32), 0, K, BK, False)
        most, norm = tl.full([BQ], float("-inf"), ACC), tl.zeros([BQ], ACC)
        total = tl.zeros([BQ, BV], ACC)
        near_k, near_v = k + row * k_batch + start * k_row + group * k_head, v + row * v_batch + group * v_head
        near_v += start * v_row
        latest = tl.minimum(tl.max(tl.where(here, at, -1)) + 1 - start, block_size).to(tl.int32)
        reach = (at - start).to(tl.int32)[:, None]
        for inside in range(0, latest, BT):
            there = inside + t
            columns = piece(near_k, there[None, :], c[:, None], latest, k_row, K, BK, False)
            scores = dot(rows, columns, WORK, PRECISION) * (scale * LOG2E)
            seen = _seen(reach, there[None, :], near[:, None], here[:, None], latest, window)
            scores = tl.where(seen, scores, float("-inf"))
            values = piece(near_v, there[:, None], column[None, :], latest, v_row, V, BV, False)
            most, norm, total = absorb(scores, values, most, norm, total, WORK, PRECISION)
        total, sums = finish(most, norm, total)
        place = pair * shared + r % shared
        tl.store(log_sum + place, tl.where(norm > 0, sums, float("-inf")), mask=here)
        out = o + place[:, None] * V + column[None, :]
        tl.store(out, total.to(o.dtype.element_ty), mask=here[:, None] & (column[None, :] < V))


@triton.jit
def partial_gradients(
    q, k, v, do, log_sum, between, dq, order, entries, first, tiles, ends, scale, window, first_row, queries, keys,
    listed, lists, groups, shared, block_size, parts,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, do_batch, do_row, do_head,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
    WORK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each pair and head what its block gives to the gradient of the query, ``[pairs, shared, K]``, without scale.
    ``log_sum`` and ``between = do . o`` are ``[B, queries, heads]``."""
    c, column, t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    for item in range(tl.program_id(0), tl.load(ends) * parts, tl.num_programs(0)):
        begin, end = tl.load(tiles + item // parts), tl.load(tiles + item // parts + 1)
        row, group, start = _block(order, entries, first, begin, first_row, queries, listed, lists, groups, block_size)
        r = item % parts * BQ + tl.arange(0, BQ)
        pair, token, head, at, near, here = _pairs(order, entries, begin, end, r, keys, queries, listed, lists, shared)
        exists = here[:, None].to(tl.int32)
        own = q + row * q_batch + (token % queries * q_row + head * q_head)[:, None]
        own_do = do + row * do_batch + (token % queries * do_row + head * do_head)[:, None]
        rows = piece(own, 0, c[None, :], exists, 0, K, BK, False)
        upstream = piece(own_do, 0, column[None, :], exists, 0, V, BV, False)
        of_row = token * lists * shared + head
        sums = tl.load(log_sum + of_row, mask=here, other=0.0)
        met = tl.load(between + of_row, mask=here, other=0.0)
        near_k, near_v = k + row * k_batch + start * k_row + group * k_head, v + row * v_batch + group * v_head
        near_v += start * v_row
        latest = tl.minimum(tl.max(tl.where(here, at, -1)) + 1 - start, block_size).to(tl.int32)
        reach = (at - start).to(tl.int32)[:, None]
        total = tl.zeros([BQ, BK], ACC)
        for inside in range(0, latest, BT):
            there = inside + t
            columns = piece(near_k, there[None, :], c[:, None], latest, k_row, K, BK, False)
            scores = dot(rows, columns, WORK, PRECISION) * (scale * LOG2E)
            seen = _seen(reach, there[None, :], near[:, None], here[:, None], latest, window)
            weights = weights_of(scores, sums[:, None], seen)
            values = piece(near_v, there[None, :], column[:, None], latest, v_row, V, BV, False)
            dscores = weights * (dot(upstream, values, WORK, PRECISION) - met[:, None])
            back = piece(near_k, there[:, None], c[None, :], latest, k_row, K, BK, False)
            total += dot(dscores, back, WORK, PRECISION)
        place = dq + (pair * shared + r % shared)[:, None] * K + c[None, :]
        tl.store(place, total.to(dq.dtype.element_ty), mask=here[:, None] & (c[None, :] < K))


@triton.jit
def block_gradients(
    q, k, v, do, log_sum, between, dk, dv, order, entries, first, runs, ends, scale, window, first_row, queries, keys,
    listed, lists, groups, shared, block_size, parts,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, do_batch, do_row, do_head,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
    WORK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dk [B, keys, groups, K]`` and ``dv [B, keys, groups, V]`` of keys that are seen, the others are not written;
    each block in so many parts of BT keys, each with all pairs that name the block."""
    c, column, t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BT)
    for item in range(tl.program_id(0), tl.load(ends + 1) * parts, tl.num_programs(0)):
        begin, end = tl.load(runs + item // parts), tl.load(runs + item // parts + 1)
        row, group, start = _block(order, entries, first, begin, first_row, queries, listed, lists, groups, block_size)
        start += item % parts * BT
        count = tl.minimum(block_size - item % parts * BT, keys - start).to(tl.int32)
        own = k + row * k_batch + start * k_row + group * k_head
        own_v = v + row * v_batch + start * v_row + group * v_head
        rows = piece(own, t[:, None], c[None, :], count, k_row, K, BK, False)
        values = piece(own_v, t[:, None], column[None, :], count, v_row, V, BV, False)
        dkeys, dvalues = tl.zeros([BT, BK], ACC), tl.zeros([BT, BV], ACC)
        latest = tl.zeros([1], tl.int32)
        for step in range(0, (end - begin) * shared, BQ):
            _, token, head, at, near, here = _pairs(
                order, entries, begin, end, step + tl.arange(0, BQ), keys, queries, listed, lists, shared
            )
            reach = tl.where(here, (at - start).to(tl.int32), -1)
            latest = tl.maximum(latest, tl.max(reach, 0) + 1)
            far, far_do = token % queries * q_row + head * q_head, token % queries * do_row + head * do_head
            exists, of_row = here.to(tl.int32), token * lists * shared + head
            from_q, from_do = q + row * q_batch, do + row * do_batch
            sums = tl.load(log_sum + of_row, mask=here, other=0.0)[None, :]
            met = tl.load(between + of_row, mask=here, other=0.0)[None, :]
            query = piece(from_q + far[None, :], 0, c[:, None], exists[None, :], 0, K, BK, False)
            scores = dot(rows, query, WORK, PRECISION) * (scale * LOG2E)
            seen = _seen(reach[None, :], t[:, None], near[None, :], here[None, :], count, window)
            weights = weights_of(scores, sums, seen)
            upstream = piece(from_do + far_do[:, None], 0, column[None, :], exists[:, None], 0, V, BV, False)
            dvalues += dot(weights, upstream, WORK, PRECISION)
            across = piece(from_do + far_do[None, :], 0, column[:, None], exists[None, :], 0, V, BV, False)
            dscores = weights * (dot(values, across, WORK, PRECISION) - met)
            query = piece(from_q + far[:, None], 0, c[None, :], exists[:, None], 0, K, BK, False)
            dkeys += dot(dscores, query, WORK, PRECISION)
        here = (t < tl.minimum(latest, count))[:, None]
        place = ((row * keys + start) * groups + group) + t[:, None] * groups
        dkeys *= scale
        tl.store(dk + place * K + c[None, :], dkeys.to(dk.dtype.element_ty), mask=here & (c[None, :] < K))
        tl.store(dv + place * V + column[None, :], dvalues.to(dv.dtype.element_ty), mask=here & (column[None, :] < V))
