"""On a CPU, some tokens at a time: sorted by expert, each expert's in one product, all that is between in the cache.

A chunk's rows, and what lies between the products, are never whole in memory. Of the forward pass the results of the
first products are kept for the backward pass, and no activations, outputs or copies of tokens. float32 products take
the faster of torch's libraries (:mod:`seqarch.ops.common.linear_onednn`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.common import linear_onednn
from seqarch.ops.common.checks import accumulation_dtype
from seqarch.ops.common.operators import define
from seqarch.ops.experts.activations import ACTIVATIONS, DERIVATIVES, name_of
from seqarch.ops.experts.groups import product_dtype, sort_by_expert

NUMBERS = 2**22
"""Of a chunk's rows, in the wider of their widths: 16 MB in float32."""

LEAST_ROWS = 256
"""Rows that each expert has in a chunk, where all have as many: fewer would read the weights too often."""


def refuse(x: Tensor, *others: Any) -> str | None:
    return None if x.device.type == "cpu" else f"x is on {x.device}, expected cpu"


class _Chunk:
    """Some tokens, sorted by expert.

    Attributes:
        tokens: the chunk's place among all tokens.
        choices: the place of its rows among those of all choices, k a token.
        order: for each row, which of the chunk's choices it is; those of no expert first.
        parts: for each expert that is chosen, its number and its rows.
    """

    def __init__(self, start: int, expert_index: Tensor, experts: int):
        count, self.top_k = expert_index.shape
        self.tokens = slice(start, start + count)
        self.choices = slice(start * self.top_k, (start + count) * self.top_k)
        self.order, starts = sort_by_expert(expert_index.flatten(), experts)
        self.none, *_ = ends = starts.tolist()
        self.parts = [(e, slice(*ends_of)) for e, ends_of in enumerate(pairwise(ends)) if ends_of[1] > ends_of[0]]

    def rows(self, x: Tensor, part: slice) -> Tensor:
        """The tokens' numbers for each row of a part."""
        return x[self.tokens].index_select(0, self.order[part] // self.top_k)

    def sums(self, rows: Tensor) -> Tensor:
        """What a token's rows come to, in the order of its choices."""
        rows[: self.none] = 0
        by_choice = torch.empty_like(rows).index_copy_(0, self.order, rows)
        return by_choice.view(self.tokens.stop - self.tokens.start, self.top_k, rows.shape[1]).sum(dim=1)


def _chunks(expert_index: Tensor, w_in: Tensor) -> Iterator[_Chunk]:
    experts, *widths = w_in.shape
    top_k = max(expert_index.shape[1], 1)
    count = max(NUMBERS // (top_k * max(*widths, 1)), LEAST_ROWS * experts // top_k, 1)
    for start in range(0, len(expert_index), count):
        yield _Chunk(start, expert_index[start : start + count], experts)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``."""
    return linear_onednn.raw_product(a, b.t()) if linear_onednn.serves(a, b) else a @ b


def _add_product(a: Tensor, b: Tensor, to: Tensor, is_first: bool) -> None:
    """``to += a b``; where that is the first, nothing has been written to ``to`` yet."""
    if is_first and to.dtype == a.dtype and not linear_onednn.serves(a, b):
        torch.mm(a, b, out=to)
    elif is_first:
        to.copy_(_product(a, b))
    else:
        to += _product(a, b)


def _kept_shape(x: Tensor, w_in: Tensor, expert_index: Tensor, w_gate: Tensor | None, keep: bool) -> tuple[int, ...]:
    return (1 if w_gate is None else 2, expert_index.numel() if keep else 0, w_in.shape[2])


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
    """y in the dtype of ``expert_weight``; and, to ``keep``, the results of the first products, each chunk's sorted."""
    act = ACTIVATIONS[activation]
    y = expert_weight.new_empty(x.shape)
    kept = x.new_empty(_kept_shape(x, w_in, expert_index, w_gate, keep))
    for chunk in _chunks(expert_index, w_in):
        weight = expert_weight.flatten()[chunk.choices][chunk.order, None]
        outputs = y.new_empty(len(weight), x.shape[1])
        for expert, part in chunk.parts:
            rows = chunk.rows(x, part)
            first = [_product(rows, each[expert]) for each in (w_in, w_gate) if each is not None]
            for to, result in zip(kept[:, chunk.choices], first, strict=True):
                if keep:
                    to[part] = result
            hidden = act(first[0]) if w_gate is None else act(first[1]) * first[0]
            outputs[part] = _product(hidden, w_out[expert])
        y[chunk.tokens] = chunk.sums(outputs.mul_(weight))
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``x, w_in, w_out, expert_weight, w_gate``, the last empty where there is none."""
    act, derivative = ACTIVATIONS[activation], DERIVATIVES[activation]
    dx, dweight = torch.empty_like(x), expert_weight.new_zeros(expert_weight.numel())
    chunks, dy = list(_chunks(expert_index, w_in)), dy.to(x.dtype)
    added_up = expert_weight if len(chunks) > 1 else x  # a sum over chunks is as wide as one over choices
    dw_in, dw_out, dw_gate = dws = [added_up.new_empty(() if w is None else w.shape) for w in (w_in, w_out, w_gate)]
    unchosen = set(range(len(w_in)))
    for chunk in chunks:
        weight = expert_weight.flatten()[chunk.choices][chunk.order, None]
        dweight_rows, drows = torch.zeros_like(weight), weight.new_empty(len(weight), x.shape[1])
        for expert, part in chunk.parts:
            rows, douts, is_first = chunk.rows(x, part), chunk.rows(dy, part), expert in unchosen
            unchosen.discard(expert)
            value, *gate = (each[part] for each in kept[:, chunk.choices])
            factor = act(gate[0]) if gate else None
            hidden = act(value) if factor is None else factor * value
            dhidden = _product(douts, w_out[expert].t())
            dweight_rows[part] = (dhidden.to(weight.dtype) * hidden).sum(dim=1, keepdim=True)
            dhidden.mul_(weight[part])
            _add_product(hidden.t(), (douts * weight[part]).to(x.dtype), dw_out[expert], is_first)
            dvalue = derivative(dhidden, value) if factor is None else dhidden * factor
            _add_product(rows.t(), dvalue, dw_in[expert], is_first)
            drows[part] = _product(dvalue, w_in[expert].t())
            if w_gate is not None:
                dgate = derivative(dhidden.mul_(value), gate[0])
                _add_product(rows.t(), dgate, dw_gate[expert], is_first)
                drows[part] += _product(dgate, w_gate[expert].t())
        dx[chunk.tokens] = chunk.sums(drows)
        dweight[chunk.choices][chunk.order] = dweight_rows[:, 0]
    for each in dws[: 2 if w_gate is None else 3]:
        each[list(unchosen)] = 0
    dw_in, dw_out, dw_gate = (each.to(x.dtype) for each in dws)
    return dx, dw_in, dw_out, dweight.view_as(expert_weight), dw_gate


def _outputs(x, w_in, w_out, expert_index, expert_weight, w_gate, activation, keep):
    y = expert_weight.new_empty(x.shape)
    return y, x.new_empty(_kept_shape(x, w_in, expert_index, w_gate, keep))


def _gradients(dy, x, w_in, w_out, expert_index, expert_weight, w_gate, activation, kept):
    dw_in, dw_out, dw_gate = (x.new_empty(() if w is None else w.shape) for w in (w_in, w_out, w_gate))
    return torch.empty_like(x), dw_in, dw_out, torch.empty_like(expert_weight), dw_gate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, kept = ctx.saved_tensors
    dx, dw_in, dw_out, dweight, dw_gate = backward(dy, *inputs, ctx.activation, kept)
    return dx, dw_in, dw_out, None, dweight, dw_gate if inputs[-1] is not None else None, None, None


forward, backward = define("experts", _forward, _backward, _outputs, _gradients, _save, _differentiate, "cpu")


def run(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_gate: Tensor | None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    dtype, wide = product_dtype(x), accumulation_dtype(x, expert_weight)
    narrow = [None if each is None else each.to(dtype) for each in (x, w_in, w_out, w_gate)]
    keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (*narrow, expert_weight))
    *before, gate = narrow
    y, _ = forward(*before, expert_index, expert_weight.to(wide), gate, name_of(activation), keep)
    return y.to(x.dtype)
