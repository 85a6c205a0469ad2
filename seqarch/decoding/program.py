"""The steps of neighbouring layers as one tape, and its runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from seqarch.decoding import elementwise, operations, reductions, shapes  # noqa: F401  (fill RULES)
from seqarch.decoding.form import form_of, is_plain, leaves_of, numbers_of, with_leaves
from seqarch.decoding.lowering import Call, Called, Changing, Lowered, Lowering, Seen, is_wide, shape_of
from seqarch.decoding.watch import Watch
from seqarch.ops.native import huge_pages
from seqarch.ops.native.tape import Tape, Workspace
from seqarch.ops.native.view import Amount, Buffer, Unserved, View, side_by_side

if TYPE_CHECKING:
    from seqarch.decoding.capture import Captured

aten = torch.ops.aten

Leaves = list[Any]


@dataclass(frozen=True)
class Part:
    """A layer in a program.

    Attributes:
        inputs: the nodes that the state's leaves are given to.
        form: of its state, which a run's has to be.
        changing: the expressions that change from token to token, by scope; ``amounts`` gives them from the state's
            whole numbers, and ``limits`` are the largest for which values have room.
        before: what torch makes of the state's leaves before the tape runs: the values of ``made``.
        is_replaced: whether the state after a token is that before it, replaced in place. Nobody looks at it then,
            which counts, since weights have pushed all else out of the cache.
        shared: what of other layers gives the same, from the same whole numbers; ``None`` where tensors take part.
    """

    captured: Captured
    lowered: Lowered
    inputs: list[fx.Node]
    form: tuple[Hashable, ...]
    changing: list[tuple[int, Amount]]
    amounts: Callable[..., list[int]]
    limits: list[int]
    before: fx.GraphModule
    made: list[fx.Node]
    is_replaced: bool
    shared: str | None

    def fits(self, leaves: Leaves) -> bool:
        """Whether a state has the form, and whole numbers, that the layer was captured with."""
        numbers = numbers_of(leaves)
        if form_of(leaves) != self.form or not self.captured.holds(*numbers):
            return False
        return not any(map(operator.gt, self.amounts(*numbers), self.limits))

    def after(self, state: Any, before: Leaves, values: Mapping[fx.Node, Any]) -> Any:
        """The state after a token, from that before it, its leaves and what torch has made."""
        if self.is_replaced:
            return state
        kinds = zip(before, self.lowered.state, strict=True)
        new = [old if kind == "kept" else values[what] if kind == "torch" else what for old, (kind, what) in kinds]
        return with_leaves(state, iter(new))


class Program:
    """Instructions for one token of each of some sequences through layers, from an input and states like these.

    Args:
        steps: what each layer does, captured with such an input and such a state.
        modules: all that take part.

    Raises:
        Unserved: there are none: a parameter is not float32, a module has hooks, a state has gaps.
    """

    def __init__(self, steps: Sequence[Captured], modules: Iterable[nn.Module], x: Tensor, states: Sequence[Any]):
        self.watch = Watch(modules)
        self.tape = tape = Tape(self.watch.take)
        here, there = tape.value(x.shape), tape.value(x.shape)
        self.input, kept, count = here, tape.used, 0
        self.parts: list[Part] = []
        for captured, state in zip(steps, states, strict=True):
            tape.scope, tape.used = len(self.parts), kept  # values of all layers lie in the same place
            leaves, views = leaves_of(state), []
            for leaf, node in zip(leaves, captured.inputs[1:], strict=True):
                views.append(_state_view(leaf, node, count) if isinstance(leaf, Tensor) else None)
                count += isinstance(leaf, Tensor)
            tape.limit = _limit(captured, leaves)
            lowered = Lowering(tape, captured).lower(here, views)
            tape.copy(lowered.output, there)
            here, there = there, here
            self.parts.append(_part(tape, captured, lowered, leaves))
        self.output = here
        self._workspaces = [Workspace(tape)]
        for tensor in tape.tensors.values():
            huge_pages.collapse(tensor)

    def fits(self, x: Tensor, leaves: Sequence[Leaves]) -> bool:
        """Whether the program is right for this input and these leaves of each layer's state."""
        return x.shape == self.input.sizes and all(map(Part.fits, self.parts, leaves))

    def run(self, x: Tensor, states: Sequence[Any], leaves: list[Leaves] | None = None) -> tuple[Tensor, list[Any]]:
        """The output for ``x``, and the states after it, tensors replaced in place; any number of threads may.

        The states' leaves :meth:`fit <fits>`, and the modules are :meth:`held <Watch.hold>`.

        Args:
            leaves: of each state, where they are at hand.
        """
        leaves = list(map(leaves_of, states)) if leaves is None else leaves
        numbers = list(map(numbers_of, leaves))
        amounts: dict[tuple[int, Amount], int] = {}
        for part, own in zip(self.parts, numbers, strict=True):
            amounts |= zip(part.changing, part.amounts(*own), strict=True)
        try:
            workspace = self._workspaces.pop()
        except IndexError:  # as many runs are under way as there are workspaces
            workspace = Workspace(self.tape)
        run = Run(workspace, leaves, amounts, self.tape.tensors)
        workspace.begin(run.states, amounts)
        workspace.tensor(self.input).copy_(x)
        after = self._run(run, states, numbers)
        y = workspace.tensor(self.output).clone()
        self._workspaces.append(workspace)
        return y, after

    def _run(self, run: Run, states: Sequence[Any], numbers: list[list[int]]) -> list[Any]:
        """The instructions, and what torch does before and among them; the states after the token."""
        known: dict[Hashable, Sequence[Any]] = {}
        values: list[dict[fx.Node, Any]] = []
        for i, (part, own, given) in enumerate(zip(self.parts, run.leaves, numbers, strict=True)):
            if not part.made and not part.lowered.calls:
                values.append({})
                continue
            key = i if part.shared is None else (part.shared, *given)
            if key not in known:
                known[key] = part.before(*own)
            values.append(dict(zip((*part.inputs, *part.made), (*own, *known[key]), strict=True)))
            run.give(part, values[-1], part.made)
        at = 0
        for i, part in enumerate(self.parts):
            for call in part.lowered.calls:
                at = run.instructions(at, call.after)
                values[i][call.node] = run.call(call, i, values[i])
                run.give(part, values[i], [call.node])
        run.instructions(at, len(self.tape.instructions))
        return list(map(Part.after, self.parts, states, run.leaves, values))

    def explain(self) -> list[list[str]]:
        """For each layer, why torch does what has no instructions."""
        return [[call.reason for call in part.lowered.calls] for part in self.parts]


class Run:
    """One token under way.

    Attributes:
        states: the tensors of the state.
        tables: of the tape, by number; ``new`` are those that instructions have not seen yet.
    """

    def __init__(
        self, workspace: Workspace, leaves: list[Leaves], amounts: Mapping[tuple[int, Amount], int],
        parameters: Mapping[Buffer, Tensor],
    ):  # fmt: skip
        self.workspace, self.leaves, self.amounts, self.parameters = workspace, leaves, amounts, parameters
        self.states = [leaf for own in leaves for leaf in own if isinstance(leaf, Tensor)]
        self.tables: dict[int, Tensor] = {}
        self.new: list[int] = []

    def give(self, part: Part, values: Mapping[fx.Node, Any], nodes: Sequence[fx.Node]) -> None:
        """The tape's tables among these nodes."""
        for number, node in part.lowered.tables.items():
            if node in nodes:
                dtype = torch.float64 if is_wide(node) else torch.float32
                self.tables[number] = values[node].to(dtype).contiguous()
                self.new.append(number)

    def instructions(self, first: int, last: int) -> int:
        if last > first:
            self.workspace.run(first, last, {number: self.tables[number] for number in self.new})
            self.new = []
        return max(first, last)

    def call(self, call: Call, scope: int, values: Mapping[fx.Node, Any]) -> Any:
        """What torch makes of values, and of numbers of the tape, which it sees as tensors."""

        def operand(value: Any) -> Any:
            if isinstance(value, Called):
                return values[value.node]
            if isinstance(value, Changing):
                return self.amounts[scope, value.amount]
            return self.tensor(value.view, scope).to(value.dtype) if isinstance(value, Seen) else value

        args, kwargs = pytree.tree_map(operand, (call.args, call.kwargs))
        return AS_STORED.get(call.node.target, call.node.target)(*args, **kwargs)

    def tensor(self, view: View, scope: int) -> Tensor:
        """Numbers of the tape as torch sees them."""

        def now(amount: Amount) -> int:
            return amount if isinstance(amount, int) else self.amounts[scope, amount]

        offset, sizes, strides = now(view.offset), tuple(map(now, view.sizes)), tuple(map(now, view.strides))
        buffer = view.buffer
        if buffer.kind in ("value", "lasting"):
            return self.workspace.tensor(replace(view, offset=offset, sizes=sizes, strides=strides))
        if buffer.kind == "parameter":
            memory = self.parameters[buffer]
        else:
            memory = self.states[buffer.what] if buffer.kind == "state" else self.tables[buffer.what]
        return memory.as_strided(sizes, strides, memory.storage_offset() + offset)


AS_STORED: Mapping[Any, Any] = dict.fromkeys((aten.view.default, aten._unsafe_view.default), aten.reshape.default)
"""What takes the place of an operator that wants numbers without gaps: a value whose size changes may have some."""


def _limit(captured: Captured, leaves: Leaves) -> Callable[[Amount], int]:
    """Room for values whose size changes: for twice the tokens so far, and some."""
    numbers = [2 * number + ROOM for number in numbers_of(leaves)]
    return lambda amount: captured.function([amount])(*numbers)[0]


ROOM = 64
"""Tokens."""


def _part(tape: Tape, captured: Captured, lowered: Lowered, leaves: Leaves) -> Part:
    changing = list(dict.fromkeys([*tape.amounts(tape.scope), *_of_calls(lowered.calls)]))
    before, made, shared = _before(captured, lowered)
    names, limits = [(tape.scope, each) for each in changing], [tape.limit(each) for each in changing]
    amounts = captured.function(changing)
    inputs = captured.inputs[1:]
    is_replaced = all(
        kind == "kept" or (leaf is what is None and kind == "constant")
        for leaf, (kind, what) in zip(leaves, lowered.state, strict=True)
    )
    return Part(captured, lowered, inputs, form_of(leaves), names, amounts, limits, before, made, is_replaced, shared)


def _of_calls(calls: Sequence[Call]) -> list[Amount]:
    operands = [each for call in calls for each in pytree.tree_leaves((call.args, call.kwargs))]
    views = [each.view for each in operands if isinstance(each, Seen)]
    amounts = [amount for view in views for amount in (view.offset, *view.sizes, *view.strides)]
    amounts += [each.amount for each in operands if isinstance(each, Changing)]
    return [amount for amount in amounts if not isinstance(amount, int)]


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


def _state_view(leaf: Tensor, node: fx.Node, number: int) -> View:
    if not is_plain(leaf) or leaf.dtype not in STATES:
        raise Unserved(f"a tensor of the state is {leaf.dtype} on {leaf.device}, has gaps, or wants gradients")
    sizes = shape_of(node)
    return View(Buffer("state", number), 0, sizes, side_by_side(sizes), leaf.dtype == torch.float64)


STATES = (
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.int16,
    torch.int8,
    torch.uint8,
)
"""Of tensors in a state; those without a fraction are torch's alone."""
