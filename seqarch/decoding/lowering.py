"""A captured step as instructions of a tape.

Nodes that depend on neither the input, parameters nor float tensors of the state, such as positions, angles and masks,
are computed as float64, in which whole numbers are exact; what depends on nothing is computed once. Where they have no
instructions torch runs them before the tape, and what they give to the others are the tape's tables. Views are
arithmetic and cost nothing. Elementwise operations on numbers of one shape are joined into one instruction as long as
they follow one another; all others are instructions of their own, by :data:`RULES`. What has no rule is left to torch
as well, among the instructions: it sees values of the tape as tensors, and what it gives is a table of the instructions
after it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from seqarch.decoding.calls import Call, Called, Changing, Seen
from seqarch.ops.native.tape import MOST_REGISTERS, Step, Tape
from seqarch.ops.native.view import Amount, Buffer, Unserved, View

if TYPE_CHECKING:
    from seqarch.decoding.capture import Captured

aten = torch.ops.aten

Rule = Callable[["Lowering", fx.Node], None]

RULES: dict[Any, Rule] = {}
"""By operator, what it is in instructions."""


def lowers(*operators: Any) -> Callable[[Rule], Rule]:
    """Say that the decorated function is the rule of these operators."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register


def amount(value: Any) -> Amount:
    """A size, an offset or another whole number of the graph as a number, or an expression of symbols."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, torch.SymInt):
        value = value.node.expr
    return int(value) if getattr(value, "is_Integer", True) else value


def shape_of(node: fx.Node) -> tuple[Amount, ...]:
    return tuple(map(amount, node.meta["val"].shape))


def is_wide(node: fx.Node) -> bool:
    """Whether a tape has a node's numbers as float64."""
    return node.meta["val"].dtype in (torch.float64, *WHOLE)


WHOLE = (torch.int64, torch.int32)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.bool)
"""What a tape computes with; truth is 0 or 1 there, and bfloat16 is float32: only what is stored is rounded."""


@dataclass
class Group:
    """Elementwise operations in the making: neighbours on numbers of one shape.

    Attributes:
        wide: whether float64 takes part, so that all of it is computed so.
        results: of each node in it, the source of its result.
        buffers: where these will lie.
    """

    sizes: tuple[Amount, ...]
    wide: bool
    inputs: list[View] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    results: dict[fx.Node, int] = field(default_factory=dict)
    buffers: set[Buffer] = field(default_factory=set)

    def read(self, view: View) -> int:
        """The source that a view is."""
        view = view.expanded(self.sizes)
        if view not in self.inputs:
            self.inputs.append(view)
        return self.inputs.index(view)

    def step(self, code: str, a: int, b: int | None = None, c: int | None = None, **numbers: float) -> int:
        """The source that the result of a step is."""
        self.steps.append(Step(code, a, b, c, **numbers))
        return -len(self.steps)

    def affine(self, a: int, number: float = 1.0, other: float = 0.0) -> int:
        return self.step("affine", a, number=number, other=other)


@dataclass(frozen=True)
class Lowered:
    """Where a layer's step has its results.

    Attributes:
        output: of the layer.
        state: of each leaf of the new state ``("kept", None)`` where it is the old one, replaced in place;
            ``("torch", node)`` where torch makes it; ``("amount", expression)`` of a whole number;
            ``("constant", value)``.
        tables: the numbers of the tape's tables, with the nodes that they are the values of.
        before: the nodes that torch runs before the tape, in order.
        calls: those that it runs in between.
    """

    output: View
    state: list[tuple[str, Any]]
    tables: dict[int, fx.Node]
    before: list[fx.Node]
    calls: list[Call]


class Lowering:
    """Writes one layer's step into a tape."""

    def __init__(self, tape: Tape, captured: Captured):
        self.tape, self.tensors = tape, captured.tensors
        self.nodes = list(captured.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.values: dict[fx.Node, Any] = {}
        self.tables: dict[fx.Node, View] = {}
        self.group: Group | None = None
        self.calls: list[Call] = []
        self.main = self._main()

    def _main(self) -> set[fx.Node]:
        """The nodes that the tape computes."""
        main: set[fx.Node] = set()
        for node in self.nodes:
            value = node.meta.get("val")
            given = node.op == "placeholder" and isinstance(value, Tensor) and value.is_floating_point()
            if given or self._is_float_parameter(node) or not main.isdisjoint(node.all_input_nodes):
                main.add(node)
        return main

    def _is_float_parameter(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and self.tensor_of(node).is_floating_point()

    def tensor_of(self, node: fx.Node) -> Tensor:
        """A parameter, a buffer or a constant."""
        return self.tensors[node.target]  # type: ignore[index]

    def lower(self, x: View, state: Sequence[View | None]) -> Lowered:
        """Write the instructions of all nodes.

        Raises:
            Unserved: one has none.
        """
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        given = dict(zip(inputs, (x, *state), strict=True))
        self.values |= {node: view for node, view in given.items() if node in self.main}
        for node in self.nodes:
            if node not in self.main or node.op == "placeholder":
                continue
            if node.op == "get_attr":
                self.values[node] = self.tape.parameter(self.tensor_of(node))
            elif node.op == "call_function":
                self._call(node)
        output = self.nodes[-1]
        y, leaves = output.args[0]  # type: ignore[misc]
        after = [self._leaf(leaf, view) for leaf, view in zip(leaves, state, strict=True)]  # type: ignore[union-attr]
        view = self.view(y)
        self.close()
        for leaf, to, (kind, _) in zip(leaves, state, after, strict=True):  # type: ignore[union-attr]
            if kind == "kept" and (found := self.values[leaf]) is not to:
                self.tape.copy(found, to)
        tables = {table.buffer.what: node for node, table in self.tables.items()}
        return Lowered(view, after, tables, self._before(after), self.calls)

    def _leaf(self, leaf: Any, before: View | None) -> tuple[str, Any]:
        if not isinstance(leaf, fx.Node):
            return "constant", leaf
        if isinstance(leaf.meta["val"], torch.SymInt):
            return "amount", amount(leaf)
        value = self.values.get(leaf)
        is_kept = (
            before is not None
            and before.dtype == torch.int64
            and isinstance(value, View)
            and value.sizes == before.sizes
        )
        if isinstance(value, Called) or (leaf not in self.main and not is_kept):
            return "torch", leaf
        view = self.view(leaf)
        if before is None or view.sizes != before.sizes:
            raise Unserved("the state takes another shape with each token")
        if view.buffer.kind == "state" and view is not before:
            raise Unserved("parts of the state change places")
        return "kept", None

    def _before(self, after: list[tuple[str, Any]]) -> list[fx.Node]:
        """The nodes that torch runs before the tape: all that is neither the tape's nor unused."""
        wanted = {*self.tables, *(node for kind, node in after if kind == "torch")}
        for call in self.calls:
            wanted.update(node for node in call.node.all_input_nodes if node not in self.main)
        wanted -= self.main
        for node in reversed(self.nodes):
            if node in wanted:
                wanted.update(node.all_input_nodes)
        if self.nodes[0] in wanted:
            raise Unserved("torch reads the input, of whole numbers")
        return [node for node in self.nodes if node in wanted and node.op in ("call_function", "get_attr")]

    def _call(self, node: fx.Node) -> None:
        if isinstance(node.meta.get("val"), torch.SymInt | int):
            return  # its users know it as an amount
        given = self.values.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
        if node.target is operator.getitem and not isinstance(given, Called):
            self.values[node] = given[node.args[1]]  # type: ignore[index]
            return
        try:
            rule, value = RULES.get(node.target), node.meta["val"]
            if rule is None:
                raise Unserved(f"no instruction does what {node.target} does")
            if isinstance(value, Tensor) and value.dtype not in FLOATS and node.target is not aten.argmax.default:
                raise Unserved(f"{node.target} gives {value.dtype}")
            rule(self, node)
        except Unserved as reason:  # what the rule has written by then fills values that nobody reads
            self._leave_to_torch(node, str(reason))

    def _leave_to_torch(self, node: fx.Node, reason: str) -> None:
        self.close()

        def operand(each: fx.Node) -> Any:
            value = self.values.get(each) if each in self.main else None
            if each in self.main and isinstance(each.meta["val"], torch.SymInt):
                size = amount(each)
                return size if isinstance(size, int) else Changing(size)
            return Seen(value, each.meta["val"].dtype) if isinstance(value, View) else Called(each)

        given: Any = fx.map_arg((node.args, node.kwargs), operand)
        args, kwargs = given
        declared = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []
        for argument, own in zip(args, declared, strict=False):
            if own.is_write and isinstance(argument, Seen) and argument.dtype != argument.view.dtype:
                raise Unserved(f"{node.target} writes to {argument.dtype} that the tape has as {argument.view.dtype}")
        self.calls.append(Call(len(self.tape.instructions), node, args, kwargs, reason))
        self.values[node] = Called(node)

    def view(self, node: Any) -> View:
        """Where a tensor lies, which may not have been computed yet: for views of it."""
        value = self.values.get(node)
        if value is None or isinstance(value, Called):
            return self._table(node)
        if not isinstance(value, View):
            raise Unserved(f"{node} is no tensor")
        return value

    def _table(self, node: fx.Node) -> View:
        if node not in self.tables:
            value = node.meta["val"]
            if not isinstance(value, Tensor) or (node in self.main and value.dtype not in FLOATS):
                raise Unserved("whole numbers are made among the instructions")
            self.tables[node] = self.tape.table(shape_of(node), is_wide(node))
        return self.tables[node]

    def constant(self, node: fx.Node) -> Tensor:
        """What a node is that depends on nothing.

        Raises:
            Unserved: it depends on the state or the input.
        """
        if node.op == "get_attr":
            return self.tensor_of(node)
        if node.op != "call_function":
            raise Unserved("entries are chosen by a computed index")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.constant)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def held(self, node: Any) -> Tensor:
        """A parameter, a buffer or a constant without gaps, for an instruction that reads whole numbers.

        Raises:
            Unserved: it is computed, or has gaps.
        """
        if node.op != "get_attr" or not self.tensor_of(node).is_contiguous():
            raise Unserved("codes or scales of weights are computed")
        return self.tensor_of(node)

    def read(self, node: Any) -> View:
        """Where a tensor lies, computed by now: for an instruction that reads it as it is stored."""
        view = self.view(node)
        if self.group is not None and view.buffer in self.group.buffers:
            self.close()
        return view

    def stored(self, *nodes: Any) -> list[Any]:
        """Of each where it lies, ``None`` of ``None``; then all that was in the making is written."""
        views = [None if node is None else self.read(node) for node in nodes]
        self.close()
        return views

    def reads(self, *nodes: Any) -> list[Any]:
        """The same for instructions that do not take bfloat16: of that a copy in float32."""
        views = self.stored(*nodes)
        return [self.tape.copy(v) if v is not None and v.dtype == torch.bfloat16 else v for v in views]

    def elementwise(self, node: fx.Node, write: Callable[[Group], int]) -> None:
        """``node`` is what ``write`` makes of the group that it is given, number by number."""
        sizes = shape_of(node)
        view = self.tape.value(sizes, is_wide(node))
        if 0 not in sizes:
            group = self._group(sizes, node)
            group.results[node] = write(group)
            group.buffers.add(view.buffer)
        self.values[node] = view

    def _group(self, sizes: tuple[Amount, ...], node: fx.Node) -> Group:
        """The group that takes an operation on numbers of these sizes."""
        group = self.group
        wide = is_wide(node) or any(is_tensor(each) and is_wide(each) for each in node.all_input_nodes)
        if group is not None:
            own = [each for each in node.all_input_nodes if each in self.values and each not in group.results]
            waits = any(isinstance(v := self.values[each], View) and v.buffer in group.buffers for each in own)
            full = len(group.inputs) + len(group.steps) > MOST_REGISTERS - 12
            if (group.sizes, group.wide) == (sizes, wide) and not waits and not full:
                return group
            self.close()
        self.group = Group(sizes, wide)
        return self.group

    def source(self, group: Group, node: Any) -> int:
        """What an elementwise operation reads of a tensor."""
        if node in group.results:
            return group.results[node]
        return group.read(self.view(node))

    def close(self) -> None:
        """Write the group in the making, if there is one: what nobody else uses is not stored."""
        group, self.group = self.group, None
        if group is None:
            return
        kept = [node for node in group.results if any(user not in group.results for user in node.users)]
        if kept:
            outputs = [self.values[node] for node in kept]
            self.tape.elementwise(outputs, group.inputs, group.steps, [group.results[node] for node in kept])

    def replaces(self, node: fx.Node, by: fx.Node) -> View:
        """Where a tensor lies that ``by`` writes over.

        Raises:
            Unserved: what was there is used later, under whatever name.
        """
        if self.is_used_after(node, by):
            raise Unserved(f"what {by.target} writes over is used again")
        return self.view(node)

    def is_used_after(self, node: fx.Node, by: fx.Node) -> bool:
        """Whether what a tensor holds is used after ``by``, under whatever name."""
        view, now = self.view(node), self.order[by]
        named = [other for other, own in self.values.items() if isinstance(own, View) and own.buffer is view.buffer]
        return any(self.order[user] > now and user.op != "output" for other in named for user in other.users)


def number(value: Any) -> float:
    """A number of the graph that stays.

    Raises:
        Unserved: it changes from token to token.
    """
    if isinstance(value, fx.Node) or not isinstance(value, (int, float)):
        raise Unserved("a number changes from token to token")
    return float(value)


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta["val"], Tensor)
