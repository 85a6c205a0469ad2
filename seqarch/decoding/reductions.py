"""Sums, norms, softmax, and products of matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import seqarch.ops.native.linear
import seqarch.ops.native.quantized_linear  # noqa: F401  (these define the operators)
from seqarch.decoding.lowering import Lowering, is_wide, lowers, number, shape_of
from seqarch.decoding.shapes import rows
from seqarch.ops.native.tape import Step
from seqarch.ops.native.view import Unserved, View, numel

aten = torch.ops.aten


@lowers(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
def _reduce(low: Lowering, node: fx.Node) -> None:
    (view,) = low.reads(node.args[0])
    given: Any = node.args[1] if len(node.args) > 1 else None
    dims = sorted({d % view.rank for d in ([given] if isinstance(given, int) else given or range(view.rank))})
    kind = {aten.amax.default: "maximum", aten.amin.default: "minimum"}.get(node.target, "sum")  # type: ignore[arg-type]
    factor = 1 / numel([view.sizes[d] for d in dims]) if node.target is aten.mean.dim else 1.0
    low.values[node] = to = low.tape.value(shape_of(node), is_wide(node))
    count = view.sizes[dims[0]] if len(dims) == 1 else None
    if isinstance(count, int) and 0 < count <= FEW:
        _reduce_few(low, kind, to, [view.part(dims[0], at, 1) for at in range(count)], dims[0], factor)
    else:
        low.tape.reduce(kind, to, view, dims, factor)


FEW = 4
"""Numbers of a reduction that an elementwise instruction joins: neighbouring results are then computed at once."""


def _reduce_few(low: Lowering, kind: str, to: View, parts: list[View], dim: int, factor: float) -> None:
    to = to.with_one(dim) if to.rank < parts[0].rank else to
    steps, last = [], 0
    for at in range(1, len(parts)):
        steps.append(Step("add" if kind == "sum" else kind, last, at, number=1.0))
        last = -len(steps)
    if factor != 1.0 or not steps:
        steps.append(Step("affine", last, number=factor))
    low.tape.elementwise([to], parts, steps, [-len(steps)])


def _over(low: Lowering, kind: str, view: View, dims: list[int], factor: float = 1.0) -> View:
    """A reduction that keeps its dimensions, repeated to the sizes of ``view``."""
    to = low.tape.value([1 if d in dims else size for d, size in enumerate(view.sizes)])
    low.tape.reduce(kind, to, view, dims, factor)
    return to.expanded(view.sizes)


@lowers(aten._softmax.default, aten._safe_softmax.default)
def _softmax(low: Lowering, node: fx.Node) -> None:
    (view,) = low.reads(node.args[0])
    dims = [int(node.args[1]) % view.rank]  # type: ignore[arg-type]
    raised, to = low.tape.value(view.sizes), low.tape.value(view.sizes)
    steps = Step("add", 0, 1, number=-1.0), Step("exp", -1)
    low.tape.elementwise([raised], [view, _over(low, "maximum", view, dims)], steps, [-2])
    low.tape.elementwise([to], [raised, _over(low, "sum", raised, dims)], [Step("divide", 0, 1)], [-1])
    low.values[node] = to


@lowers(aten.logsumexp.default)
def _logsumexp(low: Lowering, node: fx.Node) -> None:
    """``m + log(sum exp(x - m))``, m the largest; m itself where that is infinite."""
    (view,) = low.reads(node.args[0])
    given: Any = node.args[1]
    dims = sorted(d % view.rank for d in given)
    kept = [1 if d in dims else size for d, size in enumerate(view.sizes)]
    largest, total, raised = low.tape.value(kept), low.tape.value(kept), low.tape.value(view.sizes)
    low.tape.reduce("maximum", largest, view, dims)
    steps = [Step("add", 0, 1, number=-1.0), Step("exp", -1)]
    low.tape.elementwise([raised], [view, largest.expanded(view.sizes)], steps, [-2])
    low.tape.reduce("sum", total, raised, dims)
    low.values[node] = to = low.tape.value(shape_of(node), is_wide(node))
    for dim in dims if to.rank < view.rank else []:
        to = to.with_one(dim)
    steps = [Step("add", 1, 1, number=-1.0), Step("equal", -1, -1)]  # whether the largest is finite
    steps += [Step("log", 0), Step("add", -3, 1, number=1.0), Step("where", -2, -4, 1)]
    low.tape.elementwise([to], [total, largest], steps, [-5])


def _normalise(low: Lowering, view: View, dims: list[int], eps: float, weights: list[View | None]) -> View:
    """``(x - mean) / sqrt(variance + eps) weight + bias``."""
    share = 1 / numel([view.sizes[d] for d in dims])
    centred, squares, to = (low.tape.value(view.sizes) for _ in range(3))
    steps = [Step("add", 0, 1, number=-1.0), Step("multiply", -1, -1)]
    low.tape.elementwise([centred, squares], [view, _over(low, "sum", view, dims, share)], steps, [-1, -2])
    inputs = [centred, _over(low, "sum", squares, dims, share)]
    steps = [Step("affine", 1, number=1.0, other=eps), Step("rsqrt", -1), Step("multiply", 0, -2)]
    for code, weight in zip(("multiply", "add"), weights, strict=True):
        if weight is not None:
            inputs.append(weight.expanded(view.sizes))
            steps.append(Step(code, -len(steps), len(inputs) - 1, number=1.0))
    low.tape.elementwise([to], inputs, steps, [-len(steps)])
    return to


@lowers(aten.native_layer_norm.default)
def _layer_norm(low: Lowering, node: fx.Node) -> None:
    x, shape, weight, bias, eps = node.args
    view, *weights = low.reads(x, weight, bias)
    dims = list(range(view.rank - len(shape), view.rank))  # type: ignore[arg-type]
    low.values[node] = [_normalise(low, view, dims, number(eps), weights)]


@lowers(aten.native_group_norm.default)
def _group_norm(low: Lowering, node: fx.Node) -> None:
    x, weight, bias, batch, channels, inner, groups, eps = node.args
    view, *weights = low.reads(x, weight, bias)
    sizes = (batch, groups, channels // groups, inner)  # type: ignore[operator]
    grouped = view.reshaped(sizes) or low.tape.copy(view).reshaped(sizes)
    assert grouped is not None
    own = [None if each is None else each.reshaped((1, groups, sizes[2], 1)) for each in weights]
    found = _normalise(low, grouped, [2, 3], number(eps), own).reshaped(view.sizes)
    low.values[node] = [found]


@lowers(aten.mm.default, aten.addmm.default)
def _matrix_product(low: Lowering, node: fx.Node) -> None:
    bias, *factors = node.args if node.target is aten.addmm.default else (None, *node.args)
    if node.kwargs:
        raise Unserved(f"{node.target} has factors")
    (x, add), (weight,) = low.reads(factors[0], bias), low.stored(factors[1])
    to = low.tape.value(shape_of(node))
    weight = weight.permuted((1, 0))
    if _is_map(x, weight, add):
        low.tape.map(to, x, weight, add)
    else:
        (weight,) = low.reads(factors[1])
        low.tape.product(to, x, weight)
        if add is not None:
            low.tape.elementwise([to], [to, add.expanded(to.sizes)], [Step("add", 0, 1, number=1.0)], [-1])
    low.values[node] = to


def _is_map(x: View, weight: View, bias: View | None) -> bool:
    """Whether a kernel takes them that reads the weights once, in order."""
    beside = bias is None or (bias.rank == 1 and bias.is_dense(1))
    return weight.buffer.kind == "parameter" and weight.is_dense(2) and x.is_dense(1) and beside


@lowers(torch.ops.seqarch.linear.default)
def _linear(low: Lowering, node: fx.Node) -> None:
    (x, bias), (weight,) = low.reads(node.args[0], node.args[2]), low.stored(node.args[1])
    flat = rows(low.tape.dense(x, 1)) or rows(low.tape.copy(x))
    to = low.tape.value(shape_of(node))
    target = rows(to)
    assert flat is not None
    assert target is not None
    if not _is_map(flat, weight, bias):
        raise Unserved("a map has weights that are computed")
    low.tape.map(target, flat, weight, bias)
    low.values[node] = to


@lowers(torch.ops.seqarch.quantized_linear.default)
def _quantized_linear(low: Lowering, node: fx.Node) -> None:
    x, bias = low.reads(node.args[0], node.args[3])
    codes, scales = (low.held(each) for each in node.args[1:3])
    flat = rows(low.tape.dense(x, 1)) or rows(low.tape.copy(x))
    to = low.tape.value(shape_of(node))
    target = rows(to)
    assert flat is not None
    assert target is not None
    if bias is not None and not bias.is_dense(1):
        raise Unserved("a map has a bias with gaps")
    low.tape.quantized_map(target, flat, codes, scales, bias)
    low.values[node] = to


@lowers(aten.bmm.default)
def _products(low: Lowering, node: fx.Node) -> None:
    x, y = low.reads(*node.args)
    low.values[node] = to = low.tape.value(shape_of(node))
    low.tape.product(to, x, y)
