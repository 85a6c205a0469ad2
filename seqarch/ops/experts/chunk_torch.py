"""On a CPU, some tokens at a time: sorted by expert, each expert's in one product.

Neither copies of the tokens nor what lies between the products are ever whole in memory. Of the forward pass the
results of the first products are kept for the backward pass, and nothing else. float32 products take the faster of
torch's libraries (:mod:`seqarch.ops.native.onednn`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.experts import parallel_torch
from seqarch.ops.experts.activations import ACTIVATIONS, DERIVATIVES, bounded
from seqarch.ops.experts.groups import product_dtype, sort_by_expert
from seqarch.ops.experts.inputs import ExpertsInputs, Matrices
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

    keep: bool = True


WEIGHTS = ("w_in", "w_out", "w_gate", "b_in", "b_out", "b_gate")
"""The fields that hold what the experts have learnt."""


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


def _affine(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    y = _product(rows, weight.to(rows.dtype))
    return y if bias is None else y.add_(bias[expert])


def _add_product(a: Tensor, b: Tensor, to: Tensor, is_first: bool) -> None:
    """``to += a b``; where that is the first, nothing has been written to ``to`` yet."""
    if is_first and to.dtype == a.dtype and not serves(a, b.t()):
        torch.mm(a, b, out=to)
    elif is_first:
        to.copy_(_product(a, b))
    else:
        to += _product(a, b)


def _add_sum(rows: Tensor, to: Tensor, is_first: bool) -> None:
    """As :func:`_add_product`, of the sum of the rows."""
    total = rows.sum(dim=0, dtype=to.dtype)
    to.copy_(total if is_first else to + total)


def _empty_outputs(inputs: ChunkInputs) -> tuple[Tensor, Tensor]:
    """y in the dtype of ``expert_weight``; and, to ``keep``, the first products' results, sorted as chunks are."""
    shape = 1 if inputs.w_gate is None else 2, inputs.expert_index.numel() if inputs.keep else 0, inputs.w_in.shape[2]
    y = in_huge_pages(inputs.expert_weight.new_empty(inputs.x.shape))
    return y, in_huge_pages(inputs.x.new_empty(shape))


def _in_memory(inputs: ChunkInputs, experts: Sequence[int]) -> Iterator[tuple[int, Matrices]]:
    maps = {name: getattr(inputs, name) for name in ("w_in", "w_gate", "w_out")}
    given = {name: each for name, each in maps.items() if each is not None}
    return ((expert, {name: each[expert] for name, each in given.items()}) for expert in experts)


def forward(
    inputs: ChunkInputs, matrices: Callable[[Sequence[int]], Iterator[tuple[int, Matrices]]] | None = None
) -> tuple[Tensor, Tensor]:
    """y, and what is kept of the first products.

    Args:
        matrices: gives each of some experts with its matrices, in any order; by default those of the inputs.
    """
    x, matrices = inputs.x, matrices or partial(_in_memory, inputs)
    first_maps = {"w_in": inputs.b_in} if inputs.w_gate is None else {"w_in": inputs.b_in, "w_gate": inputs.b_gate}
    y, kept = _empty_outputs(inputs)
    for chunk in _chunks(inputs):
        weight, parts = chunk.weights(inputs.expert_weight), dict(chunk.parts)
        outputs = y.new_empty(len(weight), x.shape[1])
        for expert, own in matrices(list(parts)):
            part = parts[expert]
            rows = chunk.rows_of(x, part)
            first = [_affine(rows, own[name], bias, expert) for name, bias in first_maps.items()]
            if inputs.keep:
                for to, result in zip(kept[:, chunk.choices], first, strict=True):
                    to[part] = result
            hidden = inputs.hidden(first[0], first[1] if len(first) > 1 else None)
            outputs[part] = _affine(hidden, own["w_out"], inputs.b_out, expert)
        y[chunk.tokens] = chunk.add_up_(outputs.mul_(weight))
    return y, kept


def _wanted(upstream: Upstream) -> tuple[bool, bool]:
    """Whether the gradient of x is asked for, and any of the experts' weights'."""
    needed = dict(zip(ChunkInputs.__match_args__, upstream.needed, strict=True))
    return needed["x"], any(needed[name] for name in WEIGHTS)


class _PartGradients:
    """The gradients inside of one expert, of its rows of a chunk.

    Attributes:
        hidden: what its last product took.
        dvalue, dgate: of the results of the first products; ``dgate`` is ``None`` without gates.
        dweight: of each row's weight, ``[M, 1]``.
    """

    def __init__(self, inputs: ChunkInputs, expert: int, first: list[Tensor], dout: Tensor, weight: Tensor):
        act, derivative = ACTIVATIONS[inputs.activation], DERIVATIVES[inputs.activation]
        dhidden = _product(dout, inputs.w_out[expert].t())
        value, gate = first[0], first[1] if len(first) > 1 else None
        taken, multiplied = value, None
        if gate is not None:
            taken, multiplied = bounded(gate, value, inputs.limit)
            multiplied = multiplied + inputs.value_offset if inputs.value_offset else multiplied
        activated = act(taken)
        self.hidden = activated if multiplied is None else activated * multiplied
        self.dweight = (dhidden.to(weight.dtype) * self.hidden).sum(dim=1, keepdim=True)
        if inputs.b_out is not None:
            self.dweight += (dout.to(weight.dtype) * inputs.b_out[expert]).sum(dim=1, keepdim=True)
        dhidden.mul_(weight)
        self.dvalue = derivative(dhidden, value) if multiplied is None else dhidden * activated
        self.dgate = None if multiplied is None else derivative(dhidden.mul_(multiplied), taken)
        if inputs.limit and gate is not None and self.dgate is not None:
            self.dvalue = self.dvalue.where(value.abs() <= inputs.limit, 0)
            self.dgate = self.dgate.where(gate <= inputs.limit, 0)


def backward(inputs: ChunkInputs, upstream: Upstream) -> list[Tensor]:
    x, expert_weight = inputs.x, inputs.expert_weight
    (kept,), dy, (for_x, for_weights) = upstream.kept, upstream.gradients[0].to(x.dtype), _wanted(upstream)
    chunks = list(_chunks(inputs))
    wide = expert_weight if len(chunks) > 1 else x  # a sum over chunks is as wide as one over choices
    found = dict(zip(ChunkInputs.tensor_fields(), _empty_gradients(inputs, upstream, wide.dtype), strict=True))
    unchosen = set(range(len(inputs.w_in)))
    for chunk in chunks:
        weight = chunk.weights(expert_weight)
        of_weight, of_rows = torch.zeros_like(weight), weight.new_empty(len(weight), x.shape[1])
        for expert, part in chunk.parts:
            dout = chunk.rows_of(dy, part)
            inner = _PartGradients(inputs, expert, [each[part] for each in kept[:, chunk.choices]], dout, weight[part])
            of_weight[part] = inner.dweight
            if for_x:
                of_rows[part] = _product(inner.dvalue, inputs.w_in[expert].t())
                if inputs.w_gate is not None and inner.dgate is not None:
                    of_rows[part] += _product(inner.dgate, inputs.w_gate[expert].t())
            if for_weights:
                rows, is_first = chunk.rows_of(x, part).t(), expert in unchosen
                weighed = (dout * weight[part]).to(x.dtype)
                sums = {"in": (rows, inner.dvalue), "out": (inner.hidden.t(), weighed), "gate": (rows, inner.dgate)}
                for name, (left, right) in sums.items():
                    if right is not None:
                        _add_product(left, right, found[f"w_{name}"][expert], is_first)
                    if right is not None and getattr(inputs, f"b_{name}") is not None:
                        _add_sum(right, found[f"b_{name}"][expert], is_first)
                unchosen.discard(expert)
        found["expert_weight"].view(-1)[chunk.choices][chunk.order] = of_weight[:, 0]
        if for_x:
            found["x"][chunk.tokens] = chunk.add_up_(of_rows)
    for name in WEIGHTS:
        if len(found[name]):
            found[name][list(unchosen)] = 0
        found[name] = found[name].to(x.dtype)
    return list(found.values())


def _empty_gradients(inputs: ChunkInputs, upstream: Upstream, wide: torch.dtype | None = None) -> list[Tensor]:
    """Tensors like those that :func:`backward` returns, without elements where nobody asks; those of the experts'
    weights are ``wide``."""
    x, (for_x, for_weights) = inputs.x, _wanted(upstream)
    found = {"x": in_huge_pages(x.new_empty(x.shape if for_x else (0,))), "expert_index": torch.empty(0)}
    found["expert_weight"] = inputs.expert_weight.new_empty(inputs.expert_weight.shape)
    for name in WEIGHTS:
        given = getattr(inputs, name)
        shape = given.shape if for_weights and given is not None else (0,)
        found[name] = x.new_empty(shape, dtype=wide)
    return [found[name] for name in ChunkInputs.tensor_fields()]


def _by_torch(inputs: ChunkInputs) -> Tensor:
    return parallel_torch.run(inputs.replace(x=inputs.x.to(inputs.expert_weight.dtype)))


operator = Operator(
    "experts", ChunkInputs, forward, backward, _by_torch, _empty_outputs, _empty_gradients, keeps=(1,), devices="cpu"
)


def run(inputs: ExpertsInputs) -> Tensor:
    flat, dtype, wide = inputs.flat(), product_dtype(inputs.x), accumulation_dtype(inputs.x, inputs.expert_weight)
    given = {name: getattr(flat, name) for name in ("x", *WEIGHTS)}
    given = {name: None if each is None else each.to(dtype) for name, each in given.items()}
    given["expert_weight"] = flat.expert_weight.to(wide)
    keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given.values())
    fields = {name: getattr(flat, name) for name in ExpertsInputs.__match_args__}
    y, _ = operator(ChunkInputs(**{**fields, **given, "keep": keep}))
    return y.to(inputs.x.dtype).view(inputs.x.shape)
