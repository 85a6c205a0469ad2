r"""Recurrences whose gates read their own last output: sLSTM, LSTM and GRU, with a matrix per head.

With ``r = R h_{t-1} + b`` of each head and gate and ``a = x_t + r``:

.. math::
    \textrm{slstm:}\quad m_t &= \max(\log \sigma(f) + m_{t-1},\; i),\quad
        i' = e^{i - m_t},\quad f' = e^{\log \sigma(f) + m_{t-1} - m_t} \\
        c_t &= f' c_{t-1} + i' \tanh(z),\quad n_t = f' n_{t-1} + i',\quad h_t = \sigma(o)\, c_t / n_t \\
    \textrm{lstm:}\quad c_t &= \sigma(f)\, c_{t-1} + \sigma(i) \tanh(g),\quad h_t = \sigma(o) \tanh(c_t) \\
    \textrm{gru:}\quad h_t &= (1 - \sigma(z)) \tanh(x_n + \sigma(r)\, r_n) + \sigma(z)\, h_{t-1}

in which z, i, f, o; i, f, g, o; and r, z, n are the gates' a, in this order (of the GRU's n x and r apart). The output
is h. sLSTM: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", section 2.2, eq. 8-17, with the forget gate a
sigmoid; LSTM: Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000; GRU: Cho et al. 2014, with the
reset gate after the matrix, as in ``torch.nn.GRU``.

Shapes: ``x: [B, T, H, gates, W]``, ``weight: [H, gates, W, W]``, ``bias: [H, gates, W]``, states ``[B, states, H, W]``:
h, c, n and m; h and c; h.

No output depends on m, which only keeps exponents in range: a pair (c, n) means the same at any m. It is a constant to
gradients. Where n is 0, as before the first token, m is i.

Work is ``2 gates W^2`` FLOPs a token and head, one token after the other: there is no form in chunks, since a gate
needs the output before it. Sums and states are float32, or float64 where an input is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.op import Op
from seqarch.ops.gated_rnn import recurrent_cpp, recurrent_torch, recurrent_triton
from seqarch.ops.gated_rnn.inputs import GatedRnnInputs

NAME = "gated_rnn"

CELLS: dict[str, tuple[int, int]] = {"slstm": (4, 4), "lstm": (4, 2), "gru": (3, 1)}
"""How many gates and states each cell has."""

OP = Op(NAME, order=(recurrent_cpp, recurrent_triton, recurrent_torch), reference=recurrent_torch)


@OP.public
def gated_rnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cell: str,
    state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A gated recurrence over time; see the module for the equations.

    Args:
        x: what the input gives to each gate, ``[B, T, H, gates, W]``.
        weight: what the last output gives: ``[H, gates, W, W]``, multiplied from the left.
        bias: ``[H, gates, W]``, added to that.
        cell: ``"slstm"``, ``"lstm"`` or ``"gru"``.
        state: ``[B, states, H, W]`` before the first token; ``None`` means zeros.
        cu_seqlens: boundaries of the sequences packed into ``B = 1``, from 0 to T; ``state`` then has a row for each.
        backend: a name, or ``"auto"``.

    Returns:
        h ``[B, T, H, W]`` in x's dtype, and the last state, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes disagree, there is no such cell, offsets are wrong, or no backend has that name.
        TypeError: an input is not floating point.
        BackendError: the named backend cannot serve the call.
    """
    if cell not in CELLS:
        raise checks.unknown_name(f"cell of {NAME}", cell, CELLS)
    gates, states = CELLS[cell]
    checks.floating_on_one_device(NAME, x=x, weight=weight, bias=bias, state=state)
    sizes = checks.match_shapes(NAME, x=(x, "B T H gates W"), weight=(weight, "H gates W W"), bias=(bias, "H gates W"))
    if sizes["gates"] != gates:
        raise ValueError(f"{NAME}: x has {sizes['gates']} gates, expected {gates} for the cell {cell!r}")
    offsets = checks.sequence_offsets(NAME, cu_seqlens, sizes["B"], sizes["T"])
    rows = sizes["B"] if offsets is None else len(offsets) - 1
    dtype = checks.accumulation_dtype(x, weight, bias, state)
    state = checks.initial_state(NAME, state, (rows, states, sizes["H"], sizes["W"]), dtype, x.device)
    bias = weight.new_zeros(weight.shape[:3], dtype=dtype) if bias is None else bias.to(dtype)
    return OP(backend, GatedRnnInputs(x, weight.to(dtype), bias, state, cell, offsets))


def flops(length: int, heads: int, gates: int, width: int, batch_size: int = 1) -> int:
    """FLOPs of the recurrence: two a multiply-add of the matrices."""
    return 2 * batch_size * length * heads * gates * width * width
