"""The steps of neighbouring layers as one tape, and its runs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from seqarch.decoding import elementwise, operations, reductions, shapes  # noqa: F401  (fill RULES)
from seqarch.decoding.calls import Call, Called, Changing, Seen
from seqarch.decoding.form import form_of, is_plain, leaves_of, numbers_of
from seqarch.decoding.lowering import Lowering, is_wide, shape_of
from seqarch.decoding.parts import Leaves, Part, part_of, scopes_of
from seqarch.decoding.watch import Watch
from seqarch.decoding.whole_numbers import lower_whole
from seqarch.ops.native import huge_pages
from seqarch.ops.native.nearby import lines
from seqarch.ops.native.tape import Tape, Workspace
from seqarch.ops.native.view import Amount, Buffer, Unserved, View, side_by_side

if TYPE_CHECKING:
    from seqarch.decoding.capture import Captured

aten = torch.ops.aten


class Program:
    """Instructions for one token of each of some sequences through layers, from an input and states like these.

    Args:
        steps: what each layer does, captured with such an input and such a state.
        modules: all that take part.

    Raises:
        Unserved: there are none: a parameter is neither float32 nor bfloat16, a module has hooks, a state has gaps.
    """

    def __init__(self, steps: Sequence[Captured], modules: Iterable[nn.Module], x: Tensor, states: Sequence[Any]):
        self.watch = Watch(modules)
        self.tape = tape = Tape(self.watch.take)
        is_whole = x.dtype == torch.int64
        self.input = here = replace(tape.value(x.shape, is_whole), dtype=torch.int64 if is_whole else torch.float32)
        outputs, count = list(map(_output_sizes, steps)), 0
        rooms = {sizes: (tape.value(sizes), tape.value(sizes)) for sizes in outputs}
        kept, leaves = tape.used, list(map(leaves_of, states))
        self.forms, self.scopes = list(map(form_of, leaves)), scopes_of(steps, leaves)
        scope_of = {i: number for number, scope in enumerate(self.scopes) for i in scope.members}
        self.parts: list[Part] = []
        for i, (captured, own) in enumerate(zip(steps, leaves, strict=True)):
            tape.scope, tape.used = scope_of[i], kept  # values of all layers lie in the same place
            tape.limit = self.scopes[scope_of[i]].limit
            views = []
            for leaf, node in zip(own, captured.inputs[1:], strict=True):
                views.append(_state_view(leaf, node, count) if isinstance(leaf, Tensor) else None)
                count += isinstance(leaf, Tensor)
            lowering = Lowering(tape, captured)
            lower_whole(lowering, [here, *views])
            lowered = lowering.lower(here, views)
            here = tape.copy(lowered.output, rooms[outputs[i]][i % 2])
            self.parts.append(part_of(captured, lowered, scope_of[i], own))
        self.output, self.dtype = here, _output_of(steps[-1]).dtype
        for number, scope in enumerate(self.scopes):
            scope.close(tape, number, self.parts)
        tape.wanted = lines(self.watch.objects())
        self.is_whole = not any(part.made or part.lowered.calls for part in self.parts)
        self._rooms = [self._room()]
        for tensor in tape.tensors.values():
            huge_pages.collapse(tensor)

    def fits(self, x: Tensor | None, leaves: Sequence[Leaves]) -> bool:
        """Whether the program is right for this input, if it is known, and these leaves of each layer's state."""
        same = (x is None or x.shape == self.input.sizes) and list(map(form_of, leaves)) == self.forms
        return same and all(scope.fits(leaves) for scope in self.scopes)

    def run(self, x: Tensor, states: Sequence[Any], leaves: list[Leaves] | None = None) -> tuple[Tensor, list[Any]]:
        """The output for ``x``, and the states after it, tensors replaced in place; any number of threads may.

        The states' leaves :meth:`fit <fits>`, and the modules are :meth:`held <Watch.hold>`.

        Args:
            leaves: of each state, where they are at hand.
        """
        leaves = list(map(leaves_of, states)) if leaves is None else leaves
        amounts: dict[tuple[int, Amount], int] = {}
        for scope in self.scopes:
            amounts |= zip(scope.names, scope.amounts(*numbers_of(leaves[scope.members[0]])), strict=True)
        try:
            room = self._rooms.pop()
        except IndexError:  # as many runs are under way as there are rooms
            room = self._room()
        run = Run(room.workspace, leaves, amounts, self.tape.tensors)
        room.workspace.begin(run.states, amounts)
        room.input.copy_(x)
        after = self._whole(run, states) if self.is_whole else self._run(run, states)
        y = room.output.to(self.dtype, copy=True)
        self._rooms.append(room)
        return y, after

    def _room(self) -> Room:
        workspace = Workspace(self.tape)
        return Room(workspace, workspace.tensor(self.input), workspace.tensor(self.output))

    def _whole(self, run: Run, states: Sequence[Any]) -> list[Any]:
        """The instructions, where torch does nothing before and among them; the states after the token."""
        run.instructions(0, len(self.tape.instructions))
        return [
            state if part.is_replaced else part.after(state, own, {}, run.amounts)
            for part, state, own in zip(self.parts, states, run.leaves, strict=True)
        ]

    def _run(self, run: Run, states: Sequence[Any]) -> list[Any]:
        """The instructions, and what torch does before and among them; the states after the token."""
        known: dict[Hashable, Sequence[Any]] = {}
        values: list[dict[fx.Node, Any]] = []
        for i, (part, own) in enumerate(zip(self.parts, run.leaves, strict=True)):
            if not part.made and not part.lowered.calls:
                values.append({})
                continue
            key = i if part.shared is None else (part.shared, *numbers_of(own))
            if key not in known:
                known[key] = part.before(*own)
            values.append(dict(zip((*part.inputs, *part.made), (*own, *known[key]), strict=True)))
            run.give(part, values[-1], part.made)
        at = 0
        for i, part in enumerate(self.parts):
            for call in part.lowered.calls:
                at = run.instructions(at, call.after)
                values[i][call.node] = run.call(call, part.scope, values[i])
                run.give(part, values[i], [call.node])
        run.instructions(at, len(self.tape.instructions))
        return [
            part.after(state, own, made, run.amounts)
            for part, state, own, made in zip(self.parts, states, run.leaves, values, strict=True)
        ]

    def explain(self) -> list[list[str]]:
        """For each layer, why torch does what has no instructions."""
        return [[call.reason for call in part.lowered.calls] for part in self.parts]


@dataclass(frozen=True)
class Room:
    """A workspace, and its input and output as torch sees them."""

    workspace: Workspace
    input: Tensor
    output: Tensor


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


def _output_sizes(captured: Captured) -> tuple[Amount, ...]:
    return shape_of(list(captured.graph.nodes)[-1].args[0][0])  # type: ignore[index, arg-type]


def _output_of(captured: Captured) -> Tensor:
    return list(captured.graph.nodes)[-1].args[0][0].meta["val"]  # type: ignore[index, union-attr]


def _state_view(leaf: Tensor, node: fx.Node, number: int) -> View:
    if not is_plain(leaf) or leaf.dtype not in STATES:
        raise Unserved(f"a tensor of the state is {leaf.dtype} on {leaf.device}, has gaps, or wants gradients")
    sizes = shape_of(node)
    dtype = leaf.dtype if leaf.dtype in STATES[:4] else torch.float32
    return View(Buffer("state", number), 0, sizes, side_by_side(sizes), dtype)


STATES = (
    *(torch.float32, torch.float64, torch.int64, torch.bfloat16),
    *(torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
"""Of tensors in a state; those of the second line are torch's alone."""
