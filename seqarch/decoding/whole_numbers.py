"""What follows from whole numbers of the state alone, such as positions, angles and masks, as instructions.

They compute it in float64, which holds whole numbers exactly up to 2^53. What depends on nothing is computed once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from seqarch.decoding.lowering import (
    FLOATS,
    RULES,
    WHOLE,
    Lowering,
    amount,
    is_tensor,
    is_wide,
    lowers,
    number,
    shape_of,
)
from seqarch.decoding.shapes import rows
from seqarch.ops.native.view import Unserved, View, fixed, numel

aten = torch.ops.aten

LARGEST_FACTOR = 1 << 20
"""By which whole numbers are multiplied: products with lengths stay exact."""

MOST_CONSTANTS = 1 << 16
"""Numbers of a tensor that depends on nothing."""


def lower_whole(low: Lowering, inputs: Sequence[View | None]) -> None:
    """Write the instructions of nodes that are not the tape's otherwise, as far as its nodes, or the state, want them.

    Args:
        inputs: where the input and the state's leaves lie; those of whole numbers are read.
    """
    places = [node for node in low.nodes if node.op == "placeholder"]
    low.values |= {
        node: view for node, view in zip(places, inputs, strict=True) if view is not None and view.dtype == torch.int64
    }
    constant = _constants(low)
    wanted = _wanted(low)
    for node in low.nodes:
        if node not in wanted or node in low.values or not is_tensor(node):
            continue
        try:
            low.values[node] = _written(low, node, constant)
        except Unserved:
            low.values.pop(node, None)  # torch makes a table of it
    low.close()


def _constants(low: Lowering) -> set[fx.Node]:
    """Nodes that depend on nothing."""
    found: set[fx.Node] = set()
    for node in low.nodes:
        if node.op != "call_function" or not found.issuperset(node.all_input_nodes):
            continue
        tags = getattr(node.target, "tags", ())
        changes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if not changes and torch.Tag.nondeterministic_seeded not in tags:
            found.add(node)
    return found


def _wanted(low: Lowering) -> set[fx.Node]:
    """What the tape's nodes and the state after the token read, and what that is made of."""
    wanted: set[fx.Node] = set()
    for node in reversed(low.nodes):
        if node not in low.main and any(
            user in low.main or user.op == "output" or user in wanted for user in node.users
        ):
            wanted.add(node)
    return wanted


def _written(low: Lowering, node: fx.Node, constant: set[fx.Node]) -> View:
    value = node.meta["val"]
    if node in constant:
        if not fixed(shape_of(node)) or value.numel() > MOST_CONSTANTS:
            raise Unserved("it is large")
        return low.tape.filled(shape_of(node), low.constant(node), is_wide(node))
    if any(is_tensor(each) and each not in low.values for each in node.all_input_nodes):
        raise Unserved("torch makes what it is made of")
    if node.op != "call_function" or node.target is operator.getitem or (rule := RULES.get(node.target)) is None:
        raise Unserved(f"no instruction does what {node.target} does")
    _check_exact(node)
    rule(low, node)
    found = low.values[node]
    if not isinstance(found, View):
        raise Unserved(f"{node} is no tensor")
    return found


def _check_exact(node: fx.Node) -> None:
    """Raise unless float64 gives what torch gives of whole numbers."""
    value: Tensor = node.meta["val"]
    if value.dtype not in (*FLOATS, torch.int64):
        raise Unserved(f"it is {value.dtype}")
    name = str(node.target).split(".")[1]
    if value.dtype in WHOLE and name.startswith("mul"):
        factors = [each for each in node.args if not is_tensor(each)]
        if not factors or abs(number(factors[0])) > LARGEST_FACTOR:
            raise Unserved("a product of whole numbers may be too large")


@lowers(aten.embedding.default)
def _look_up(low: Lowering, node: fx.Node) -> None:
    weight, index = low.stored(*node.args[:2])
    flat = index.reshaped((numel(index.sizes),))
    if index.dtype != torch.int64 or flat is None or weight.buffer.kind != "parameter" or not weight.is_dense(2):
        raise Unserved("rows are chosen by a computed index, or from numbers that are computed")
    low.values[node] = to = low.tape.value(shape_of(node))
    target = rows(to)
    assert target is not None
    low.tape.look_up(target, flat, weight)


@lowers(aten.argmax.default)
def _largest(low: Lowering, node: fx.Node) -> None:
    (x,) = low.reads(node.args[0])
    if len(node.args) != 2 or int(node.args[1]) % x.rank != x.rank - 1:  # type: ignore[arg-type]
        raise Unserved("the largest number of another dimension than the last")
    flat = rows(low.tape.dense(x, 1)) or rows(low.tape.copy(x))
    assert flat is not None
    low.values[node] = to = low.tape.value(shape_of(node), wide=True)
    target = to.reshaped((flat.sizes[0],))
    assert target is not None
    low.tape.argmax(target, flat)


@lowers(aten.full.default)
def _full(low: Lowering, node: fx.Node) -> None:
    """A number of the state that each token has a value for."""
    sizes, value = shape_of(node), amount(node.args[1])
    if isinstance(value, (int, float)) or not fixed(sizes):
        raise Unserved("numbers whose count changes")
    low.values[node] = low.tape.number(value).expanded(sizes)
