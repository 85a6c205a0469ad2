"""Triton kernel of matrix-state recurrences token by token: the state stays in registers, each token is one pass."""

# Triton gives Python's syntax another meaning than its types say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from seqarch.ops.triton.tiles import NONE, SCALAR, put, tile


@triton.jit
def steps(
    q, k, v, beta, read, log_decay, initial, out, last, offsets, scale, q_stride, k_stride, v_stride, beta_stride,
    read_stride, decay_stride, groups, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Linear attention, or the delta rule if DELTA; one program per sequence, head and block of V. ``BK >= K``."""
    pid = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = tl.cdiv(V, BV)
    block, head, sequence = pid % blocks, pid // blocks % heads, pid // blocks // heads
    group = head // (heads // groups)
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    c = tl.arange(0, BK)[:, None]
    columns = (block * BV + tl.arange(0, BV))[None, :]
    inside = (c < K) & (columns < V)
    place = (sequence * heads + head) * K * V + c * V + columns
    state = tl.load(initial + place, mask=inside, other=0.0).to(ACC)
    for step in range(end - begin):
        row = begin + step  # in 64 bits, by the interpreter too
        if DECAY == SCALAR:
            state *= tl.exp(tl.load(log_decay + row * decay_stride + head).to(ACC))
        elif DECAY != NONE:
            state *= tl.exp(tile(log_decay + head * K, row, c, end, decay_stride, K).to(ACC))
        value = tile(v + head * V, row, columns, end, v_stride, V).to(ACC)
        if DELTA:
            reader = tile(read + group * K, row, c, end, read_stride, K).to(ACC)
            recalled = tl.sum(reader * state, 0)[None, :]
            value = (value - recalled) * tl.load(beta + row * beta_stride + head).to(ACC)
        state += tile(k + group * K, row, c, end, k_stride, K).to(ACC) * value
        query = tile(q + group * K, row, c, end, q_stride, K).to(ACC) * scale
        put(out + head * V, tl.sum(query * state, 0)[None, :], row, columns, end, heads * V, V)
    tl.store(last + place, state.to(last.dtype.element_ty), mask=inside)
