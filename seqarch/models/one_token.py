"""One decoded token: what layers do for it is captured once, and then takes a single compiled call.

In torch a token of a small model takes longer in calls than in reading its weights. So each layer's own ``forward`` is
captured (:mod:`seqarch.decoding`), of any mixer and channel mixer, at the first token with a state of some form; what
has no instructions goes on in torch. ``Stack.explain_one_token`` says what that is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules import module as global_hooks
from torch.utils import _pytree as pytree

from seqarch.decoding.alike import are_alike, rebound
from seqarch.decoding.form import form_of, leaves_of, numbers_of
from seqarch.decoding.program import Program
from seqarch.decoding.watch import Watch
from seqarch.layers.mixer import clone_state
from seqarch.ops.dispatch.eager import has_dispatch_mode, is_eager
from seqarch.ops.dispatch.op import is_unobserved
from seqarch.ops.native import tape
from seqarch.ops.native.view import Unserved

if TYPE_CHECKING:
    from seqarch.decoding.capture import Captured
    from seqarch.models.stack import StackState
    from seqarch.models.stack_layer import StackLayer

MOST_ROWS = 8
"""Sequences of a batch; for more of them torch's products of matrices are as fast."""

DTYPES = (torch.float32, torch.bfloat16)
"""Of the residual streams that programs compute."""

MOST_CAPTURES = 16
"""Of a stack for some number of rows: one whose state takes ever other forms runs in torch."""

FUTILE = 4
"""What a capture counts of which nothing came."""

EXPLAINED = 5
"""Tokens after which ``explain`` looks at a layer."""

Unit = list["StackLayer"]
"""Layers that are captured together: one, or all of a stack whose layers hand tensors on."""

Piece = tuple[list[Unit], Program | str]
"""Neighbouring units, and their program or why they have none."""

Given = tuple[list["StackState"], list[list[Any]]]
"""Of a piece the states of its units, and what each holds."""

InTurn = Callable[..., tuple[Tensor, "StackState"]]


@dataclass
class Known:
    """What is known of a stack for some number of rows.

    Attributes:
        layers: that it is known of.
        variants: their pieces, the last that were written first.
        captures: how often they were captured.
    """

    layers: Unit
    variants: list[list[Piece]] = field(default_factory=list)
    captures: int = 0


class OneToken:
    """Runs one token that :meth:`serves` through compiled programs, or as ``in_turn`` does.

    Programs are written when first needed, so that a token is the same whenever it is asked for, and again when layers
    have changed. They replace the state in place. Threads may share one: programs are only read.
    """

    def __init__(self, in_turn: InTurn):
        self.in_turn = in_turn
        self.known: dict[int, Known] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return OneToken, (self.in_turn,)  # without the addresses in programs: copies write their own

    def __call__(self, layers: Unit, x: Tensor, state: StackState | None) -> tuple[Tensor, StackState]:
        """The outputs ``[B, 1, ...]`` of layers one after another, and the state after them."""
        known = self.known.get(len(x))
        if known is None or known.layers != layers:
            known = self.known[len(x)] = Known(layers)
        if state is None:
            state = tuple(tuple(mixer.init_state(len(x)) for mixer in layer.mixers) for layer in layers)  # type: ignore[operator]
        return self._through(known, x, state)

    def _through(self, known: Known, x: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        layers = known.layers
        for pieces in list(known.variants):
            programs = [program for _, program in pieces if isinstance(program, Program)]
            memory = [program.watch.hold() for program in programs]  # kept until the end of the run
            if None in memory:
                known = self.known[len(x)] = Known(layers)  # something has changed: all begins anew
                break
            if (given := _given(pieces, x, state)) is not None:
                return self._run(pieces, x, given)
        if not all(each.is_contiguous() for each in leaves_of(state) if isinstance(each, Tensor)):
            return self._through(known, x, pytree.tree_map_only(Tensor, Tensor.contiguous, state))
        pieces = self._write(known, x, state) if known.captures < MOST_CAPTURES else []
        memory = [program.watch.hold() for _, program in pieces if isinstance(program, Program)]
        given = _given(pieces, x, state) if memory and None not in memory else None
        return self.in_turn(layers, x, state, None) if given is None else self._run(pieces, x, given)

    def _run(self, pieces: Sequence[Piece], x: Tensor, given: Sequence[Given]) -> tuple[Tensor, StackState]:
        after: list[Any] = []
        for (units, program), (before, leaves) in zip(pieces, given, strict=True):
            if isinstance(program, Program):
                x, carried = program.run(x, before, leaves)
                after += chain.from_iterable(carried)
            else:
                x, carried = self.in_turn([*chain.from_iterable(units)], x, tuple(chain.from_iterable(before)), None)
                after += carried
        return x, tuple(after)

    def _write(self, known: Known, x: Tensor, state: StackState) -> list[Piece]:
        """The pieces for such a state; none where nothing of it is compiled."""
        if _features(x, known.layers).dtype not in DTYPES:  # tokens do not tell it, and capturing takes a second
            known.captures = MOST_CAPTURES
            return []
        units = _units(known.layers)
        states = _split([([unit], "") for unit in units], state)
        here = x
        for unit, (own,) in zip(units, states, strict=True):
            # what layers keep from call to call, such as tables, is made of tensors with values; a copy of all caches
            # at once may not fit into memory
            here = self.in_turn(unit, here, clone_state(own), None)[0]
        steps = _captured_in_turn(self.in_turn, units, x, [own for (own,) in states])
        pieces: list[Piece] = []
        begin = 0
        for _, group in groupby(steps, key=lambda step: isinstance(step, str)):
            own = list(group)
            given = x if begin == 0 else _features(x, known.layers)
            part, before = units[begin : begin + len(own)], [each for (each,) in states[begin : begin + len(own)]]
            pieces.append((part, own[0] if isinstance(own[0], str) else _program(own, part, given, before)))
            begin += len(own)
        if not any(isinstance(program, Program) for _, program in pieces):
            known.captures += FUTILE
            return []
        known.captures += 1
        known.variants.insert(0, pieces)
        return pieces

    @staticmethod
    def serves(x: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
        """Whether a program may run: one token of a few rows, on a CPU, in such a dtype, without gradients, unobserved.

        Whoever chose or records backends, or looks at torch's calls otherwise, sees the layers run in torch.
        """
        return (
            x.shape[1] == 1
            and 0 < x.shape[0] <= MOST_ROWS
            and type(x) is Tensor
            and x.dtype in dtypes
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and is_eager(x.device)
            and not has_dispatch_mode()
            and not global_hooks._has_any_global_hook()
            and is_unobserved()
            and tape.unavailable() is None
        )

    @torch.no_grad()
    def explain(self, layers: Unit) -> list[str]:
        """For each layer, whether one token of it is compiled and what of it is not, or why it is not at all."""
        if (reason := tape.unavailable()) is not None:
            return [reason] * len(layers)
        x = layers[0].example()
        state: Any = tuple(tuple(m.init_state(1, 4 * EXPLAINED) for m in layer.mixers) for layer in layers)  # type: ignore[operator]
        for _ in range(EXPLAINED):
            _, state = self.in_turn(layers, x, state, None)
        state = pytree.tree_map_only(Tensor, Tensor.contiguous, state)
        units = _units(layers)
        states = [own for (own,) in _split([([unit], "") for unit in units], state)]
        steps = _captured_in_turn(self.in_turn, units, x, states)
        said = [_said(step, unit, x, own) for step, unit, own in zip(steps, units, states, strict=True)]
        return said if len(said) == len(layers) else said * len(layers)


def _units(layers: Unit) -> list[Unit]:
    """Layers by themselves; those of a stack that hand tensors on together, without what stands before and after it."""
    own = [layer for layer in layers if layer.mixers]
    if not any(layer.exchanges for layer in own):
        return [[layer] for layer in layers]
    begin = layers.index(own[0])
    before, after = layers[:begin], layers[begin + len(own) :]
    return [*([each] for each in before), own, *([each] for each in after)]


def _features(x: Tensor, layers: Unit) -> Tensor:
    """What goes from layer to layer, where the first of them takes tokens."""
    if x.is_floating_point():
        return x
    (example,) = (layer.example() for layer in layers[1:2])
    return example.new_zeros(len(x), *example.shape[1:])


def _said(step: Captured | str, unit: Unit, x: Tensor, state: Any) -> str:
    program = step if isinstance(step, str) else _program([step], [unit], x, [state])
    if isinstance(program, str):
        return program
    (reasons,) = program.explain()
    return "; ".join(["compiled", *(f"torch: {each}" for each in dict.fromkeys(reasons))])


def _split(pieces: Sequence[Piece], state: StackState) -> list[list[StackState]]:
    """Of each piece the states of its units."""
    lengths = [len(unit) for units, _ in pieces for unit in units]
    states = iter([state[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)])
    return [[next(states) for _ in units] for units, _ in pieces]


def _given(pieces: Sequence[Piece], x: Tensor, state: StackState) -> list[Given] | None:
    """Of each piece the states of its units, and their leaves if it has a program; ``None`` where one does not fit."""
    found: list[Given] = []
    for i, ((_, program), own) in enumerate(zip(pieces, _split(pieces, state), strict=True)):
        leaves = list(map(leaves_of, own)) if isinstance(program, Program) else []
        if isinstance(program, Program) and not program.fits(x if i == 0 else None, leaves):
            return None
        found.append((own, leaves))
    return found


def _captured_in_turn(in_turn: InTurn, units: Sequence[Unit], x: Tensor, states: Sequence[Any]) -> list[Any]:
    """What each unit does; of those that are alike, what one of them does with the others' parameters."""
    steps: list[Captured | str] = []
    seen: list[tuple[Hashable, Unit, Captured]] = []
    features = _features(x, [*chain.from_iterable(units)])
    for i, (unit, state) in enumerate(zip(units, states, strict=True)):
        given, leaves = features if i else x, leaves_of(state)
        form = (form_of(leaves), *numbers_of(leaves))
        for known, twin, step in seen:
            if known == form and are_alike(twin, unit) and _unhooked(unit) is None:
                steps.append(replace(step, tensors=rebound(step.tensors, twin, unit)))
                break
        else:
            steps.append(_captured(in_turn, unit, given, state))
            if not isinstance(steps[-1], str):
                seen.append((form, unit, steps[-1]))
    return steps


def _unhooked(unit: Unit) -> str | None:
    """Why a unit's modules are not to be captured, as hooks are not to see that; ``None`` where they are."""
    try:
        Watch(chain.from_iterable(layer.modules() for layer in unit))
    except Unserved as reason:
        return str(reason)
    return None


def _captured(in_turn: InTurn, unit: Unit, x: Tensor, state: Any) -> Captured | str:
    """What a unit does for a token, or why that is not known."""
    from seqarch.decoding.capture import capture  # what it needs of torch takes a second to import

    try:
        Watch(
            chain.from_iterable(layer.modules() for layer in unit)
        )  # before anything is captured that hooks would see
        return capture(lambda x, state: in_turn(unit, x, state, None), x, state)
    except Unserved as reason:
        return str(reason)


def _program(steps: Sequence[Any], units: Sequence[Unit], x: Tensor, states: Sequence[Any]) -> Program | str:
    try:
        modules = (module for unit in units for layer in unit for module in layer.modules())
        return Program(steps, modules, x, states)
    except Unserved as reason:
        return str(reason)
