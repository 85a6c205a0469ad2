"""Triton kernels of gated recurrences: a program holds the states of one sequence and head, token after token.

The matrices of a head are read again for each token, from the device's caches. What backward finds for the gates,
``dr``, makes the gradients of matrices and biases in products outside of the kernels.

Rows are the tokens of the whole batch. ``x, dx, dr [rows, heads, GATES, W]``, of which x may have rows further apart;
``weight [heads, GATES, W, W]``; ``steps [rows, STATES, heads, W]``, the states after each token.
"""

# Triton gives Python's syntax another meaning than its types say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

SLSTM, LSTM, GRU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _gates(x, weight, bias, h, gate, i, W: tl.constexpr, BW: tl.constexpr):
    """What the input and what the last output give to one gate of the channels i."""
    j = tl.arange(0, BW)[None, :]
    rows = i[:, None]
    R = tl.load(weight + (gate * W + rows) * W + j, mask=(rows < W) & (j < W), other=0.0)
    own = tl.load(x + gate * W + i, mask=i < W, other=0.0).to(h.dtype)
    return own, tl.sum(R * h[None, :], 1) + tl.load(bias + gate * W + i, mask=i < W, other=0.0)


@triton.jit
def _through(weight, d, gate, i, W: tl.constexpr, BW: tl.constexpr):
    """The gradient of the last output from that of what it gives to one gate."""
    j = tl.arange(0, BW)[None, :]
    rows = i[:, None]
    R = tl.load(weight + (gate * W + rows) * W + j, mask=(rows < W) & (j < W), other=0.0)
    return tl.sum(R * d[:, None], 0)


@triton.jit
def _program(offsets, weight, bias, heads, GATES: tl.constexpr, W: tl.constexpr):
    """The head and sequence of this program, the sequence's bounds, and the head's matrices and biases."""
    pid = tl.program_id(0).to(tl.int64)
    head, sequence = pid % heads, pid // heads
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    return head, sequence, begin, end, weight + head * GATES * W * W, bias + head * GATES * W


@triton.jit
def forward(
    x, weight, bias, initial, out, steps, last, offsets, x_row, heads,
    W: tl.constexpr, BW: tl.constexpr, CELL: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr,
    KEEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``out [rows, heads, W]``, ``last`` and, if they are to KEEP, ``steps``."""
    head, sequence, begin, end, weight, bias = _program(offsets, weight, bias, heads, GATES, W)
    i = tl.arange(0, BW)
    between = heads * W
    place = sequence * STATES * between + head * W + i
    h = tl.load(initial + place, mask=i < W, other=0.0).to(ACC)
    c, n, m = tl.zeros([BW], ACC), tl.zeros([BW], ACC), tl.zeros([BW], ACC)
    if CELL != GRU:
        c = tl.load(initial + place + between, mask=i < W, other=0.0).to(ACC)
    if CELL == SLSTM:
        n = tl.load(initial + place + 2 * between, mask=i < W, other=0.0).to(ACC)
        m = tl.load(initial + place + 3 * between, mask=i < W, other=0.0).to(ACC)
    for step in range(end - begin):
        row = begin + step  # in 64 bits, by the interpreter too
        gates = x + row * x_row + head * GATES * W
        x0, r0 = _gates(gates, weight, bias, h, 0, i, W, BW)
        x1, r1 = _gates(gates, weight, bias, h, 1, i, W, BW)
        x2, r2 = _gates(gates, weight, bias, h, 2, i, W, BW)
        if CELL == GRU:
            new = _tanh(x2 + tl.sigmoid(x0 + r0) * r2)
            h = new + tl.sigmoid(x1 + r1) * (h - new)
        else:
            x3, r3 = _gates(gates, weight, bias, h, 3, i, W, BW)
            if CELL == LSTM:
                c = tl.sigmoid(x1 + r1) * c + tl.sigmoid(x0 + r0) * _tanh(x2 + r2)
                h = tl.sigmoid(x3 + r3) * _tanh(c)
            else:
                write, forgotten = x1 + r1, _log_sigmoid(x2 + r2) + m
                m = tl.where(n == 0.0, write, tl.maximum(forgotten, write))
                keep = tl.exp(tl.minimum(forgotten - m, 0.0))
                c = keep * c + tl.exp(write - m) * _tanh(x0 + r0)
                n = keep * n + tl.exp(write - m)
                h = tl.sigmoid(x3 + r3) * c / tl.where(i < W, n, 1.0)
        tl.store(out + (row * heads + head) * W + i, h.to(out.dtype.element_ty), mask=i < W)
        if KEEP:
            _store_states(steps + row * STATES * between + head * W + i, h, c, n, m, between, i, W, CELL)
    _store_states(last + place, h, c, n, m, between, i, W, CELL)


@triton.jit
def _store_states(to, h, c, n, m, between, i, W: tl.constexpr, CELL: tl.constexpr):
    tl.store(to, h, mask=i < W)
    if CELL != GRU:
        tl.store(to + between, c, mask=i < W)
    if CELL == SLSTM:
        tl.store(to + 2 * between, n, mask=i < W)
        tl.store(to + 3 * between, m, mask=i < W)


@triton.jit
def _before(initial, steps, first, state, i, W: tl.constexpr):
    """A state before a token: the initial one at the first, else that of the step before."""
    there, here = i < tl.where(first, 0, W), i < tl.where(first, W, 0)
    return tl.load(steps + state, mask=there, other=0.0) + tl.load(initial + state, mask=here, other=0.0)


@triton.jit
def _back_through_gru(x0, r0, x1, r1, x2, r2, h, dh):
    """The gradients of what three gates get, of what the last one gets of the last output, and of that output."""
    reset, keep = tl.sigmoid(x0 + r0), tl.sigmoid(x1 + r1)
    new = _tanh(x2 + reset * r2)
    d2 = dh * (1.0 - keep) * (1.0 - new * new)
    return d2 * r2 * reset * (1.0 - reset), dh * (h - new) * keep * (1.0 - keep), d2, d2 * reset, dh * keep


@triton.jit
def _back_through_lstm(i, f, g, o, c, c_after, dh, dc):
    """The gradients of what four gates get, and of c before the token."""
    write, keep, new = tl.sigmoid(i), tl.sigmoid(f), _tanh(g)
    out, shown = tl.sigmoid(o), _tanh(c_after)
    dc += dh * out * (1.0 - shown * shown)
    di, df, dg = dc * new * write * (1.0 - write), dc * c * keep * (1.0 - keep), dc * write * (1.0 - new * new)
    return di, df, dg, dh * shown * out * (1.0 - out), dc * keep


@triton.jit
def _back_through_slstm(z, i, f, o, c, n, m, c_after, n_after, m_after, dh, dc, dn):
    """The gradients of what four gates get, and of c and n before the token."""
    new, out, write = _tanh(z), tl.sigmoid(o), tl.exp(i - m_after)
    keep = tl.exp(tl.minimum(_log_sigmoid(f) + m - m_after, 0.0))
    ratio = c_after / n_after
    dc += dh * out / n_after
    dn -= dh * out * ratio / n_after
    df = (dc * c + dn * n) * keep * tl.sigmoid(-f)
    dz, di, do = dc * write * (1.0 - new * new), (dc * new + dn) * write, dh * ratio * out * (1.0 - out)
    return dz, di, df, do, dc * keep, dn * keep


@triton.jit
def backward(
    x, weight, bias, initial, steps, dout, dlast, dx, dr, dinitial, offsets, x_row, heads,
    W: tl.constexpr, BW: tl.constexpr, CELL: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """``dx``, ``dr`` and ``dinitial``, from the gradients of out and last."""
    head, sequence, begin, end, weight, bias = _program(offsets, weight, bias, heads, GATES, W)
    i = tl.arange(0, BW)
    between, inside = heads * W, i < W
    place = sequence * STATES * between + head * W + i
    dh = tl.load(dlast + place, mask=inside, other=0.0).to(ACC)
    dc, dn, dm = tl.zeros([BW], ACC), tl.zeros([BW], ACC), tl.zeros([BW], ACC)
    if CELL != GRU:
        dc = tl.load(dlast + place + between, mask=inside, other=0.0).to(ACC)
    if CELL == SLSTM:
        dn = tl.load(dlast + place + 2 * between, mask=inside, other=0.0).to(ACC)
        if begin == end:  # what else comes to m is none
            dm = tl.load(dlast + place + 3 * between, mask=inside, other=0.0).to(ACC)
    for step in range(end - begin):
        row = end - 1 - step
        first = row == begin
        after = steps + row * STATES * between + head * W + i
        kept = steps + (row - 1) * STATES * between + head * W + i
        start = initial + place
        dh += tl.load(dout + (row * heads + head) * W + i, mask=inside, other=0.0).to(ACC)
        gates = x + row * x_row + head * GATES * W
        h = _before(start, kept, first, 0, i, W).to(ACC)
        x0, r0 = _gates(gates, weight, bias, h, 0, i, W, BW)
        x1, r1 = _gates(gates, weight, bias, h, 1, i, W, BW)
        x2, r2 = _gates(gates, weight, bias, h, 2, i, W, BW)
        to, to_r = dx + (row * heads + head) * GATES * W + i, dr + (row * heads + head) * GATES * W + i
        if CELL == GRU:
            d0, d1, d2, d2_r, dh = _back_through_gru(x0, r0, x1, r1, x2, r2, h, dh)
            tl.store(to + 2 * W, d2.to(dx.dtype.element_ty), mask=inside)
            d2 = d2_r
        else:
            x3, r3 = _gates(gates, weight, bias, h, 3, i, W, BW)
            c, c_after = _before(start, kept, first, between, i, W), tl.load(after + between, mask=inside, other=0.0)
            if CELL == LSTM:
                d0, d1, d2, d3, dc = _back_through_lstm(x0 + r0, x1 + r1, x2 + r2, x3 + r3, c, c_after, dh, dc)
            else:
                n, m = _before(start, kept, first, 2 * between, i, W), _before(start, kept, first, 3 * between, i, W)
                n_after = tl.load(after + 2 * between, mask=inside, other=1.0)
                m_after = tl.load(after + 3 * between, mask=inside, other=0.0)
                d0, d1, d2, d3, dc, dn = _back_through_slstm(
                    x0 + r0, x1 + r1, x2 + r2, x3 + r3, c, n, m, c_after, n_after, m_after, dh, dc, dn
                )
            tl.store(to + 2 * W, d2.to(dx.dtype.element_ty), mask=inside)
            tl.store(to + 3 * W, d3.to(dx.dtype.element_ty), mask=inside)
            tl.store(to_r + 3 * W, d3, mask=inside)
            dh = _through(weight, tl.where(inside, d3, 0.0), 3, i, W, BW)
        tl.store(to, d0.to(dx.dtype.element_ty), mask=inside)
        tl.store(to + W, d1.to(dx.dtype.element_ty), mask=inside)
        tl.store(to_r, d0, mask=inside)
        tl.store(to_r + W, d1, mask=inside)
        tl.store(to_r + 2 * W, d2, mask=inside)
        dh += _through(weight, tl.where(inside, d0, 0.0), 0, i, W, BW)
        dh += _through(weight, tl.where(inside, d1, 0.0), 1, i, W, BW)
        dh += _through(weight, tl.where(inside, d2, 0.0), 2, i, W, BW)
    _store_states(dinitial + place, dh, dc, dn, dm, between, i, W, CELL)
