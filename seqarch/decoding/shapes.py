"""Operators that look at the same numbers otherwise, and those that put numbers together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from seqarch.decoding.lowering import Lowering, amount, is_wide, lowers, shape_of
from seqarch.ops.native.tape import Step
from seqarch.ops.native.view import Amount, Unserved, View

aten = torch.ops.aten


def _dim(node: fx.Node, place: int, rank: int, default: int = 0) -> int:
    """A dimension among the arguments, counted from the first."""
    return int(node.args[place] if len(node.args) > place else default) % rank  # type: ignore[arg-type]


@lowers(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _reshape(low: Lowering, node: fx.Node) -> None:
    sizes, view = shape_of(node), low.view(node.args[0])
    found = view.reshaped(sizes)
    if found is None:
        (view,) = low.reads(node.args[0])
        found = low.tape.copy(view).reshaped(sizes)
        assert found is not None
    low.values[node] = found


@lowers(aten.slice.Tensor)
def _slice(low: Lowering, node: fx.Node) -> None:
    view = low.view(node.args[0])
    dim = _dim(node, 1, view.rank)
    given = [amount(each) for each in (*node.args[2:], *(None, None, 1)[len(node.args) - 2 :])]
    start, step = given[0] or 0, given[2]
    if isinstance(start, int) and start < 0:
        start = start + view.sizes[dim]
    if isinstance(start, int) and isinstance(view.sizes[dim], int):
        start = min(max(start, 0), view.sizes[dim])
    low.values[node] = view.part(dim, start, shape_of(node)[dim], step)


@lowers(aten.select.int)
def _select(low: Lowering, node: fx.Node) -> None:
    view = low.view(node.args[0])
    dim, at = _dim(node, 1, view.rank), amount(node.args[2])
    low.values[node] = view.without(dim, at + view.sizes[dim] if isinstance(at, int) and at < 0 else at)


@lowers(aten.unbind.int)
def _unbind(low: Lowering, node: fx.Node) -> None:
    view = low.view(node.args[0])
    dim = _dim(node, 1, view.rank)
    low.values[node] = [view.without(dim, at) for at in range(len(node.meta["val"]))]


@lowers(aten.split.Tensor, aten.split_with_sizes.default)
def _split(low: Lowering, node: fx.Node) -> None:
    view = low.view(node.args[0])
    dim, at = _dim(node, 2, view.rank), 0
    parts = []
    for each in node.meta["val"]:
        size = amount(each.shape[dim])
        parts.append(view.part(dim, at, size))
        at = at + size
    low.values[node] = parts


@lowers(aten.t.default, aten.transpose.int, aten.permute.default)
def _permute(low: Lowering, node: fx.Node) -> None:
    view = low.view(node.args[0])
    order = list(range(view.rank))
    if node.target is aten.permute.default:
        order = [int(d) % view.rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    elif view.rank > 1:
        a, b = (0, 1) if node.target is aten.t.default else (_dim(node, 1, view.rank), _dim(node, 2, view.rank))
        order[a], order[b] = order[b], order[a]
    low.values[node] = view.permuted(order)


@lowers(aten.unsqueeze.default)
def _unsqueeze(low: Lowering, node: fx.Node) -> None:
    view = low.view(node.args[0])
    low.values[node] = view.with_one(_dim(node, 1, view.rank + 1))


@lowers(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(low: Lowering, node: fx.Node) -> None:
    view = low.view(node.args[0])
    given: Any = node.args[1] if len(node.args) > 1 else range(view.rank)
    dims = {int(d) % view.rank for d in ([given] if isinstance(given, int) else given)}
    for dim in sorted(dims, reverse=True):
        view = view.without(dim) if view.sizes[dim] == 1 else view
    low.values[node] = view


@lowers(aten.expand.default)
def _expand(low: Lowering, node: fx.Node) -> None:
    low.values[node] = low.view(node.args[0]).expanded(shape_of(node))


@lowers(aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def _same(low: Lowering, node: fx.Node) -> None:
    low.values[node] = low.view(node.args[0])


@lowers(aten.cat.default, aten.stack.default)
def _join(low: Lowering, node: fx.Node) -> None:
    views, sizes = low.reads(*node.args[0]), shape_of(node)  # type: ignore[misc]
    dim, at = _dim(node, 1, len(sizes)), 0
    to = low.tape.value(sizes, is_wide(node))
    for view in views:
        view = view.with_one(dim) if node.target is aten.stack.default else view
        if 0 not in view.sizes:
            low.tape.copy(view, to.part(dim, at, view.sizes[dim]))
            at += view.sizes[dim]
    low.values[node] = to


@lowers(aten.constant_pad_nd.default)
def _pad(low: Lowering, node: fx.Node) -> None:
    (view,), sizes, pads = low.reads(node.args[0]), shape_of(node), list(node.args[1])  # type: ignore[arg-type]
    to = whole = low.tape.filled(sizes, float(node.args[2]) if len(node.args) > 2 else 0.0)  # type: ignore[arg-type]
    for dim in range(view.rank - len(pads) // 2, view.rank):
        before, after = pads[2 * (view.rank - 1 - dim) :][:2]
        view = view.part(dim, max(-before, 0), view.sizes[dim] + min(before, 0) + min(after, 0))
        to = to.part(dim, max(before, 0), view.sizes[dim])
    low.tape.copy(view, to)
    low.values[node] = whole


@lowers(aten.repeat.default)
def _repeat(low: Lowering, node: fx.Node) -> None:
    (view,) = low.reads(node.args[0])
    times: Sequence[int] = node.args[1]  # type: ignore[assignment]
    view = view.expanded([1] * (len(times) - view.rank) + list(view.sizes))
    sizes = [each for pair in zip(times, view.sizes, strict=True) for each in pair]
    strides: list[Amount] = [each for stride in view.strides for each in (0, stride)]
    to = low.tape.value(shape_of(node))
    target = to.reshaped(sizes)
    assert target is not None
    low.tape.copy(view.laid(sizes, strides), target)
    low.values[node] = to


@lowers(aten.index_select.default)
def _pick(low: Lowering, node: fx.Node) -> None:
    (view,) = low.reads(node.args[0])
    dim, chosen = _dim(node, 1, view.rank), low.constant(node.args[2]).tolist()  # type: ignore[arg-type]
    to, at = low.tape.value(shape_of(node)), 0
    while at < len(chosen):
        count = _run(chosen[at:])
        step = chosen[at + 1] - chosen[at] if count > 1 else 1
        low.tape.copy(view.part(dim, chosen[at], count, step), to.part(dim, at, count))
        at += count
    low.values[node] = to


def _run(numbers: list[int]) -> int:
    """How many of the first numbers follow one another in equal steps."""
    count = min(2, len(numbers))
    while count < len(numbers) and numbers[count] - numbers[count - 1] == numbers[1] - numbers[0]:
        count += 1
    return count


@lowers(aten.copy_.default)
def _write(low: Lowering, node: fx.Node) -> None:
    to, view = low.stored(node.args[0], node.args[1])
    if to.buffer.kind == "parameter":
        raise Unserved("it writes to a parameter or a buffer of its own")
    low.tape.copy(view, to)
    low.values[node] = to


def rows(view: View) -> View | None:
    """All but the last dimension as one."""
    count: Amount = 1
    for size in view.sizes[:-1]:
        count = count * size
    return view.reshaped((count, view.sizes[-1]))


MOST_RUNNING = 8
"""Numbers of a running sum or extreme that are instructions, one for each."""


def _running(low: Lowering, node: fx.Node, code: str) -> View:
    """Along a dimension each number joined with what all before it have come to."""
    view = low.view(node.args[0])
    dim = _dim(node, 1, view.rank)
    count = view.sizes[dim]
    if count == 1:
        return view
    if not isinstance(count, int) or count > MOST_RUNNING:
        raise Unserved("a running sum or extreme of many numbers")
    (view,) = low.reads(node.args[0])
    to = low.tape.value(view.sizes, view.wide)
    low.tape.copy(view.part(dim, 0, 1), to.part(dim, 0, 1))
    for at in range(1, count):
        both = [to.part(dim, at - 1, 1), view.part(dim, at, 1)]
        low.tape.elementwise([to.part(dim, at, 1)], both, [Step(code, 0, 1, number=1.0)], [-1])
    return to


@lowers(aten.cumsum.default)
def _running_sum(low: Lowering, node: fx.Node) -> None:
    low.values[node] = _running(low, node, "add")


@lowers(aten.cummax.default)
def _running_extreme(low: Lowering, node: fx.Node) -> None:
    if any(user.args[1] != 0 for user in node.users):
        raise Unserved("the place of a running extreme")
    low.values[node] = [_running(low, node, "maximum")]
