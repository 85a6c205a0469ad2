"""On a CPU, some tokens at a time: sorted by expert, each expert's in one product.

Neither copies of the tokens nor what lies between the products are ever whole in memory. Of the forward pass the
results of the first products are kept for the backward pass, and nothing else. float32 products take the faster of
torch's libraries (:mod:`seqarch.ops.native.onednn`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.experts import parallel_torch
from seqarch.ops.experts.activations import ACTIVATIONS, DERIVATIVES
from seqarch.ops.experts.groups import product_dtype, sort_by_expert
from seqarch.ops.experts.inputs import ExpertsInputs
from seqarch.ops.native.custom_op import Operator, Upstream
from seqarch.ops.native.huge_pages import in_huge_pages
from seqarch.ops.native.onednn import fastest_product, serves

CHUNK_NUMBERS = 2**22
"""Of a chunk's rows, in the wider of their widths: 16 MB in float32."""

LEAST_ROWS = 256
"""Rows per expert in a chunk, where all have as many: with fewer the weights would be read too often. For them a chunk
may be four times as large."""


def unsupported(inputs: ExpertsInputs) -> str | None:
    return None if inputs.device.type == "cpu" else f"x is on {inputs.device}, expected cpu"


@dataclass(frozen=True)
class ChunkInputs(ExpertsInputs):
    """The operator's inputs: flat tokens, all but ``expert_weight`` in the dtype of products, that in one of sums.

    Attributes:
        keep: whether the first products' results are kept for a backward pass.
    """

    keep: bool


class _Chunk:
    """Some tokens and their choices of experts, k per token; a row is a choice, sorted by expert.

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


def _chunks(inputs: ChunkInputs) -> Iterator[_Chunk]:
    expert_index, (experts, *widths) = inputs.expert_index, inputs.w_in.shape
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


def _empty_outputs(inputs: ChunkInputs) -> tuple[Tensor, Tensor]:
    """y in the dtype of ``expert_weight``; and, to ``keep``, the first products' results, sorted as chunks are."""
    shape = 1 if inputs.w_gate is None else 2, inputs.expert_index.numel() if inputs.keep else 0, inputs.w_in.shape[2]
    y = in_huge_pages(inputs.expert_weight.new_empty(inputs.x.shape))
    return y, in_huge_pages(inputs.x.new_empty(shape))


def forward(inputs: ChunkInputs) -> tuple[Tensor, Tensor]:
    x, w_in, w_out, w_gate = inputs.x, inputs.w_in, inputs.w_out, inputs.w_gate
    act = ACTIVATIONS[inputs.activation]
    y, kept = _empty_outputs(inputs)
    for chunk in _chunks(inputs):
        weight = chunk.weights(inputs.expert_weight)
        outputs = y.new_empty(len(weight), x.shape[1])
        for expert, part in chunk.parts:
            rows = chunk.rows_of(x, part)
            first = [_product(rows, each[expert]) for each in (w_in, w_gate) if each is not None]
            if inputs.keep:
                for to, result in zip(kept[:, chunk.choices], first, strict=True):
                    to[part] = result
            hidden = act(first[0]) if w_gate is None else act(first[1]) * first[0]
            outputs[part] = _product(hidden, w_out[expert])
        y[chunk.tokens] = chunk.add_up_(outputs.mul_(weight))
    return y, kept


def _wanted(upstream: Upstream) -> tuple[bool, bool]:
    """Whether the gradient of x is asked for, and any of the experts' weights'."""
    for_x, *for_weights = (upstream.needed[i] for i in (0, 1, 2, 5))
    return for_x, any(for_weights)


def backward(inputs: ChunkInputs, upstream: Upstream) -> list[Tensor]:
    x, w_in, w_out, w_gate, expert_weight = inputs.x, inputs.w_in, inputs.w_out, inputs.w_gate, inputs.expert_weight
    act, derivative = ACTIVATIONS[inputs.activation], DERIVATIVES[inputs.activation]
    (kept,), dy, (for_x, for_weights) = upstream.kept, upstream.gradients[0].to(x.dtype), _wanted(upstream)
    chunks = list(_chunks(inputs))
    wide = expert_weight if len(chunks) > 1 else x  # a sum over chunks is as wide as one over choices
    dx, dw_in, dw_out, none, dweight, dw_gate = _empty_gradients(inputs, upstream, wide.dtype)
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
    dw_in, dw_out, dw_gate = (each.to(x.dtype) for each in (dw_in, dw_out, dw_gate))
    return [dx, dw_in, dw_out, none, dweight, dw_gate]


def _empty_gradients(inputs: ChunkInputs, upstream: Upstream, wide: torch.dtype | None = None) -> list[Tensor]:
    """Tensors like those that :func:`backward` returns, without elements where nobody asks; those of the experts'
    weights are ``wide``."""
    x, (for_x, for_weights) = inputs.x, _wanted(upstream)
    dw_in, dw_out, dw_gate = (
        x.new_empty(w.shape if for_weights and w is not None else (0,), dtype=wide)
        for w in (inputs.w_in, inputs.w_out, inputs.w_gate)
    )
    dx = in_huge_pages(x.new_empty(x.shape if for_x else (0,)))
    return [dx, dw_in, dw_out, torch.empty(0), inputs.expert_weight.new_empty(inputs.expert_weight.shape), dw_gate]


def _by_torch(inputs: ChunkInputs) -> Tensor:
    return parallel_torch.run(inputs.replace(x=inputs.x.to(inputs.expert_weight.dtype)))


operator = Operator(
    "experts", ChunkInputs, forward, backward, _by_torch, _empty_outputs, _empty_gradients, keeps=(1,), devices="cpu"
)


def run(inputs: ExpertsInputs) -> Tensor:
    flat, dtype, wide = inputs.flat(), product_dtype(inputs.x), accumulation_dtype(inputs.x, inputs.expert_weight)
    x, w_in, w_out, expert_weight = flat.x.to(dtype), flat.w_in.to(dtype), flat.w_out.to(dtype), flat.expert_weight
    w_gate = None if flat.w_gate is None else flat.w_gate.to(dtype)
    differentiable = (x, w_in, w_out, w_gate, expert_weight)
    keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in differentiable)
    index, weight = flat.expert_index, expert_weight.to(wide)
    y, _ = operator(ChunkInputs(x, w_in, w_out, index, weight, w_gate, flat.activation, keep))
    return y.to(inputs.x.dtype).view(inputs.x.shape)
