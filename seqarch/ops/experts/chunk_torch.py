"""On a CPU, some tokens at a time: sorted by expert, each expert's in one product.

Neither copies of the tokens nor what lies between the products are ever whole in memory. Of the forward pass the
results of the first products are kept for the backward pass, and nothing else. float32 products take the faster of
torch's libraries (:mod:`seqarch.ops.native.onednn`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.experts import parallel_torch
from seqarch.ops.experts.activations import ACTIVATIONS, DERIVATIVES
from seqarch.ops.experts.groups import product_dtype, sort_by_expert
from seqarch.ops.native.custom_op import Formula, Saved, define
from seqarch.ops.native.huge_pages import in_huge_pages
from seqarch.ops.native.onednn import fastest_product, serves

CHUNK_NUMBERS = 2**22
"""Of a chunk's rows, in the wider of their widths: 16 MB in float32."""

LEAST_ROWS = 256
"""Rows an expert in a chunk, where all have as many: with fewer the weights would be read too often. For them a chunk
may be four times as large."""


def refuse(x: Tensor, *others: Any) -> str | None:
    return None if x.device.type == "cpu" else f"x is on {x.device}, expected cpu"


class _Chunk:
    """Some tokens and their choices of experts, k a token; a row is a choice, sorted by expert.

    Attributes:
        tokens, choices: the chunk's places among all tokens and all choices.
        top_k: k.
        order: of which choice of the chunk each row is.
        none: how many rows, the first, are of no expert.
        parts: each expert that is chosen, with its rows.
    """

    def __init__(self, start: int, expert_index: Tensor, experts: int):
        count, self.top_k = expert_index.shape
        self.tokens = slice(start, start + count)
        self.choices = slice(start * self.top_k, (start + count) * self.top_k)
        self.order, starts = sort_by_expert(expert_index.flatten(), experts)
        ends = starts.tolist()
        self.none = ends[0]
        self.parts = [(e, slice(start, end)) for e, (start, end) in enumerate(pairwise(ends)) if end > start]

    def rows_of(self, x: Tensor, part: slice) -> Tensor:
        """The tokens' numbers for each row of a part."""
        return x[self.tokens].index_select(0, self.order[part] // self.top_k)

    def weights(self, expert_weight: Tensor) -> Tensor:
        """The weight of each row, ``[M, 1]``."""
        return expert_weight.flatten()[self.choices][self.order, None]

    def add_up_(self, rows: Tensor) -> Tensor:
        """The sum of each token's rows, in the order of its choices; rows of no expert are made 0."""
        rows[: self.none] = 0
        by_choice = torch.empty_like(rows).index_copy_(0, self.order, rows)
        return by_choice.view(self.tokens.stop - self.tokens.start, self.top_k, rows.shape[1]).sum(dim=1)


def _chunks(expert_index: Tensor, w_in: Tensor) -> Iterator[_Chunk]:
    experts, *widths = w_in.shape
    top_k = max(expert_index.shape[1], 1)
    count = max(CHUNK_NUMBERS // (top_k * max(*widths, 1)), 1)
    count = max(count, min(LEAST_ROWS * experts // top_k, 4 * count))
    for start in range(0, len(expert_index), count):
        yield _Chunk(start, expert_index[start : start + count], experts)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``."""
    return fastest_product(a, b.t())


def _add_product(a: Tensor, b: Tensor, to: Tensor, is_first: bool) -> None:
    """``to += a b``; where that is the first, nothing has been written to ``to`` yet."""
    if is_first and to.dtype == a.dtype and not serves(a, b.t()):
        torch.mm(a, b, out=to)
    elif is_first:
        to.copy_(_product(a, b))
    else:
        to += _product(a, b)


def _room_to_keep(x: Tensor, w_in: Tensor, expert_index: Tensor, w_gate: Tensor | None, keep: bool) -> Tensor:
    shape = 1 if w_gate is None else 2, expert_index.numel() if keep else 0, w_in.shape[2]
    return in_huge_pages(x.new_empty(shape))


def _forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_gate: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y in the dtype of ``expert_weight``; and, to ``keep``, the first products' results, sorted as chunks are."""
    act = ACTIVATIONS[activation]
    y, kept = _outputs(x, w_in, w_out, expert_index, expert_weight, w_gate, activation, keep)
    for chunk in _chunks(expert_index, w_in):
        weight = chunk.weights(expert_weight)
        outputs = y.new_empty(len(weight), x.shape[1])
        for expert, part in chunk.parts:
            rows = chunk.rows_of(x, part)
            first = [_product(rows, each[expert]) for each in (w_in, w_gate) if each is not None]
            if keep:
                for to, result in zip(kept[:, chunk.choices], first, strict=True):
                    to[part] = result
            hidden = act(first[0]) if w_gate is None else act(first[1]) * first[0]
            outputs[part] = _product(hidden, w_out[expert])
        y[chunk.tokens] = chunk.add_up_(outputs.mul_(weight))
    return y, kept


def _backward(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_gate: Tensor | None,
    activation: str,
    kept: Tensor,
    for_x: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``x, w_in, w_out, w_gate`` and ``expert_weight``, empty where none is asked for."""
    act, derivative = ACTIVATIONS[activation], DERIVATIVES[activation]
    chunks, dy = list(_chunks(expert_index, w_in)), dy.to(x.dtype)
    wide = expert_weight if len(chunks) > 1 else x  # a sum over chunks is as wide as one over choices
    dx, dw_in, dw_out, dw_gate, dweight = gradients = _gradients(
        dy, x, w_in, w_out, expert_index, expert_weight, w_gate, activation, kept, for_x, for_weights, wide
    )
    unchosen = set(range(len(w_in)))
    for chunk in chunks:
        weight = chunk.weights(expert_weight)
        of_weight, of_rows = torch.zeros_like(weight), weight.new_empty(len(weight), x.shape[1])
        for expert, part in chunk.parts:
            value, *gates = (each[part] for each in kept[:, chunk.choices])
            dout, gate = chunk.rows_of(dy, part), gates[0] if gates else None
            open_gate = None if gate is None else act(gate)
            hidden = act(value) if open_gate is None else open_gate * value
            dhidden = _product(dout, w_out[expert].t())
            of_weight[part] = (dhidden.to(weight.dtype) * hidden).sum(dim=1, keepdim=True)
            dhidden.mul_(weight[part])
            dvalue = derivative(dhidden, value) if open_gate is None else dhidden * open_gate
            dgate = None if gate is None else derivative(dhidden.mul_(value), gate)
            if for_x:
                of_rows[part] = _product(dvalue, w_in[expert].t())
                if w_gate is not None and dgate is not None:
                    of_rows[part] += _product(dgate, w_gate[expert].t())
            if for_weights:
                rows, is_first = chunk.rows_of(x, part), expert in unchosen
                _add_product(rows.t(), dvalue, dw_in[expert], is_first)
                _add_product(hidden.t(), (dout * weight[part]).to(x.dtype), dw_out[expert], is_first)
                if dgate is not None:
                    _add_product(rows.t(), dgate, dw_gate[expert], is_first)
                unchosen.discard(expert)
        dweight.view(-1)[chunk.choices][chunk.order] = of_weight[:, 0]
        if for_x:
            dx[chunk.tokens] = chunk.add_up_(of_rows)
    for each in (dw_in, dw_out, dw_gate):
        if len(each):
            each[list(unchosen)] = 0
    *narrow, dweight = gradients
    dx, dw_in, dw_out, dw_gate = (each.to(x.dtype) for each in narrow)
    return dx, dw_in, dw_out, dw_gate, dweight


def _outputs(x, w_in, w_out, expert_index, expert_weight, w_gate, activation, keep):
    return in_huge_pages(expert_weight.new_empty(x.shape)), _room_to_keep(x, w_in, expert_index, w_gate, keep)


def _gradients(
    dy, x, w_in, w_out, expert_index, expert_weight, w_gate, activation, kept, for_x, for_weights, wide=None
):
    """Room for what :func:`_backward` returns, those of the experts' weights in the dtype of ``wide``."""
    shapes = [w.shape if for_weights and w is not None else (0,) for w in (w_in, w_out, w_gate)]
    of_weights = [(x if wide is None else wide).new_empty(shape) for shape in shapes]
    dx = in_huge_pages(x.new_empty(x.shape if for_x else (0,)))
    return dx, *of_weights, expert_weight.new_empty(expert_weight.shape)


def _differentiate(call: Saved, dy: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, _ = call.inputs
    for_x, *for_weights = (call.needed[i] for i in (0, 1, 2, 5))
    dx, *dws, dweight = backward(dy, *inputs, *call.kept, for_x, any(for_weights))
    dw_in, dw_out, dw_gate = (dw if wanted else None for dw, wanted in zip(dws, for_weights, strict=True))
    return dx if for_x else None, dw_in, dw_out, None, dweight, dw_gate


def _plain(x, w_in, w_out, expert_index, expert_weight, w_gate, activation, keep):
    """The first output of ``_forward``, of the same arguments, by torch's own functions."""
    return parallel_torch.run(x.to(expert_weight.dtype), w_in, w_out, expert_index, expert_weight, w_gate, activation)


_formula = Formula(_differentiate, _plain, keeps=(1,))
forward, backward = define("experts", _forward, _backward, _outputs, _gradients, _formula, "cpu")


def run(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_gate: Tensor | None,
    activation: str,
) -> Tensor:
    dtype, wide = product_dtype(x), accumulation_dtype(x, expert_weight)
    narrow = [None if each is None else each.to(dtype) for each in (x, w_in, w_out, w_gate)]
    keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (*narrow, expert_weight))
    *before, gate = narrow
    y, _ = forward(*before, expert_index, expert_weight.to(wide), gate, activation, keep)
    return y.to(x.dtype)
