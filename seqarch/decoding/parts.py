"""The layers of a program: what a token of each changes, and what torch does beside the instructions."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from seqarch.decoding.calls import Changing, Seen
from seqarch.decoding.form import numbers_of, with_leaves
from seqarch.decoding.lowering import Lowered
from seqarch.ops.native.tape import Tape
from seqarch.ops.native.view import Amount

if TYPE_CHECKING:
    from seqarch.decoding.capture import Captured

Leaves = list[Any]

ROOM = 64
"""Tokens."""


@dataclass(frozen=True)
class Part:
    """A layer in a program.

    Attributes:
        scope: of its whole numbers.
        inputs: the nodes that the state's leaves are given to.
        before: what torch makes of the state's leaves before the tape runs: the values of ``made``.
        is_replaced: whether the state after a token is that before it, replaced in place. Nobody looks at it then,
            which counts, since weights have pushed all else out of the cache.
        shared: what of other layers gives the same, from the same whole numbers; ``None`` where tensors take part.
    """

    captured: Captured
    lowered: Lowered
    scope: int
    inputs: list[fx.Node]
    before: fx.GraphModule
    made: list[fx.Node]
    is_replaced: bool
    shared: str | None

    def after(self, state: Any, before: Leaves, values: Mapping[fx.Node, Any], amounts: Mapping[Any, int]) -> Any:
        """The state after a token, from that before it, its leaves, what torch has made, and whole numbers."""
        if self.is_replaced:
            return state
        return with_leaves(state, self._leaves_after(before, values, amounts))

    def _leaves_after(self, before: Leaves, values: Mapping[fx.Node, Any], amounts: Mapping[Any, int]) -> Iterator[Any]:
        for old, (kind, what) in zip(before, self.lowered.state, strict=True):
            if kind == "kept":
                yield old
            elif kind == "amount":
                yield what if isinstance(what, int) else amounts[self.scope, what]
            else:
                yield values[what] if kind == "torch" else what


def part_of(captured: Captured, lowered: Lowered, scope: int, leaves: Leaves) -> Part:
    before, made, shared = _before(captured, lowered)
    is_replaced = all(
        kind == "kept" or (leaf is what is None and kind == "constant")
        for leaf, (kind, what) in zip(leaves, lowered.state, strict=True)
    )
    return Part(captured, lowered, scope, captured.inputs[1:], before, made, is_replaced, shared)


def _before(captured: Captured, lowered: Lowered) -> tuple[fx.GraphModule, list[fx.Node], str | None]:
    """What torch does before the tape as a function of the state's leaves; its code where nothing else takes part."""
    graph, inputs, nodes = fx.Graph(), captured.inputs[1:], lowered.before
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in nodes])
    module = fx.GraphModule(dict(captured.tensors), graph)
    read = {each for node in nodes for each in node.all_input_nodes if each.op == "placeholder"}
    tensors = any(isinstance(node.meta.get("val"), Tensor) for node in read)
    alone = not tensors and all(node.op != "get_attr" for node in nodes)
    return module, nodes, module.code if alone else None


class Scope:
    """The whole numbers of layers that were captured alike, and that count the same tokens.

    Attributes:
        names: of what follows from them and changes from token to token, ``(scope, expression)``; ``amounts`` gives
            it, and ``limits`` are the largest for which values have room.
    """

    def __init__(self, captured: Captured, numbers: Sequence[int], members: Sequence[int]):
        self.captured, self.numbers, self.members = captured, list(numbers), list(members)
        self.names: list[tuple[int, Amount]] = []
        self.amounts: Callable[..., list[int]] = captured.function([])
        self.limits: list[int] = []

    def limit(self, amount: Amount) -> int:
        """Room for values whose size changes: for twice the tokens so far, and some."""
        return self.captured.function([amount])(*(2 * number + ROOM for number in self.numbers))[0]

    def close(self, tape: Tape, number: int, parts: Sequence[Part]) -> None:
        """All instructions are written: what changes in them is known."""
        own = [parts[i] for i in self.members]
        sized = list(dict.fromkeys([*tape.amounts(number), *(each for part in own for each in _of_calls(part))]))
        others = [amount for scope, amount in tape.numbers if scope == number]
        others += [what for part in own for kind, what in part.lowered.state if kind == "amount"]
        others = [each for each in dict.fromkeys(others) if each not in sized and not isinstance(each, int)]
        self.names = [(number, each) for each in (*sized, *others)]
        self.amounts = self.captured.function([*sized, *others])
        self.limits = [self.limit(each) for each in sized] + [sys.maxsize] * len(others)

    def fits(self, leaves: Sequence[Leaves]) -> bool:
        """Whether the layers' states count the same tokens, as many as the program is right and has room for."""
        numbers = numbers_of(leaves[self.members[0]])
        if any(numbers_of(leaves[i]) != numbers for i in self.members[1:]) or not self.captured.holds(*numbers):
            return False
        return not any(map(operator.gt, self.amounts(*numbers), self.limits))


def scopes_of(steps: Sequence[Captured], leaves: Sequence[Leaves]) -> list[Scope]:
    """Layers together whose steps are one graph, and whose states have the same whole numbers."""
    found: dict[Hashable, list[int]] = {}
    for i, (captured, own) in enumerate(zip(steps, leaves, strict=True)):
        found.setdefault((id(captured.graph), *numbers_of(own)), []).append(i)
    return [Scope(steps[members[0]], numbers_of(leaves[members[0]]), members) for members in found.values()]


def _of_calls(part: Part) -> list[Amount]:
    operands = [each for call in part.lowered.calls for each in pytree.tree_leaves((call.args, call.kwargs))]
    views = [each.view for each in operands if isinstance(each, Seen)]
    amounts = [amount for view in views for amount in (view.offset, *view.sizes, *view.strides)]
    amounts += [each.amount for each in operands if isinstance(each, Changing)]
    return [amount for amount in amounts if not isinstance(amount, int)]
