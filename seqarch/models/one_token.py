"""One decoded token: the layers that can say it in instructions take it in a single compiled call.

In torch a token of a small model takes longer in calls than in reading its weights. A class's instructions are its
method ``one_token``, beside the ``forward`` whose outputs they compute; ``Program.include`` calls it in place of the
module:

    HeadNorm, RMSNorm   seqarch/layers/modules/norms.py
    Linear              seqarch/layers/modules/linear.py
    Mamba               seqarch/layers/state_space/mamba.py
    Mlp, SwiGlu         seqarch/layers/channel/mlp.py
    ShortConvolution    seqarch/layers/modules/short_conv.py
    StackLayer          seqarch/models/stack_layer.py

``Stack.explain_one_token`` reports which layers of a stack are compiled, and why others are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, UntypedStorage
from torch.nn.modules import module as global_hooks
from torch.utils import _pytree as pytree

from seqarch.models.streams import first
from seqarch.ops.dispatch.eager import has_dispatch_mode, is_eager
from seqarch.ops.dispatch.op import is_unobserved
from seqarch.ops.native import token
from seqarch.ops.native.token import MOST_ROWS, Program, Unserved

if TYPE_CHECKING:
    from seqarch.models.stack import StackState
    from seqarch.models.stack_layer import StackLayer


Part = tuple[Program, list["StackLayer"]]
"""Neighbouring layers and their program."""


class OneToken:
    """Runs one token that :meth:`serves` through compiled programs, layers without instructions as ``otherwise`` does.

    Programs are written when first needed, and again when layers have changed. They replace the state in place. Threads
    may share one: programs are only read.
    """

    def __init__(self, otherwise: Callable[..., tuple[Tensor, StackState, Mapping[str, Any]]]):
        self.otherwise = otherwise
        self.programs: dict[int, list[Part]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return OneToken, (self.otherwise,)  # without the addresses in programs: copies write their own

    def __call__(self, layers: Sequence[StackLayer], x: Tensor, state: StackState | None) -> tuple[Tensor, StackState]:
        """The outputs ``[B, 1, D]`` of layers one after another, and the state after them."""
        if state is None:
            state = tuple(tuple(mixer.init_state(len(x)) for mixer in layer.mixers) for layer in layers)  # type: ignore[operator]
        after: list[Any] = []
        handed: Mapping[str, Any] = {"input": first(x)}
        for (program, part), storages in self._parts(layers, len(x)):
            before = state[len(after) : len(after) + len(part)]
            y = None if storages is None else program.run(x, _tensors(before))
            if y is None:
                x, before, handed = self.otherwise(part, x, before, None, None, None, handed)
            else:
                x = y
            after += before
        return x, tuple(after)

    @staticmethod
    def serves(x: Tensor) -> bool:
        """Whether a program may run: one token of up to 4 rows, on a CPU, in float32, without gradients, unobserved.

        Whoever chose or records backends, or looks at torch's calls otherwise, sees the layers run in torch.
        """
        return (
            x.shape[1] == 1
            and 0 < x.shape[0] <= MOST_ROWS
            and type(x) is Tensor
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and is_eager(x.device)
            and not has_dispatch_mode()
            and not global_hooks._has_any_global_hook()
            and is_unobserved()
            and token.unavailable() is None
        )

    def _parts(self, layers: Sequence[StackLayer], rows: int) -> list[tuple[Part, list[UntypedStorage] | None]]:
        """The parts with their parameters' memory, ``None`` where another thread has changed layers just now."""
        parts = self.programs.get(rows, [])
        storages = [program.hold() for program, _ in parts]
        known = chain.from_iterable(part for _, part in parts)
        if not parts or [*known] != [*layers] or any(each is None for each in storages):
            parts = self.programs[rows] = _write(layers, rows)
            storages = [program.hold() for program, _ in parts]
        return list(zip(parts, storages, strict=True))


def _tensors(state: StackState) -> list[Tensor]:
    """The tensors of a state as mixers' named tuples hold them."""
    return [leaf for states in state for own in states if isinstance(own, tuple) for leaf in own if leaf is not None]


def _write(layers: Sequence[StackLayer], rows: int) -> list[Part]:
    """Neighbouring layers that have instructions with their program, the others with one that stays empty."""
    unsupported = {layer: _unsupported(layer, rows) is not None for layer in layers}
    groups = [list(group) for _, group in groupby(layers, key=unsupported.__getitem__)]
    return [(_empty(part, rows) if unsupported[part[0]] else _finished(part, rows), part) for part in groups]


def _finished(layers: Sequence[StackLayer], rows: int) -> Program:
    with suppress(Unserved):  # only where another thread has changed a layer since it was asked
        return _program(layers, rows)
    return _empty(layers, rows)


def _empty(layers: Sequence[StackLayer], rows: int) -> Program:
    return Program(rows, layers[0].width, chain.from_iterable(layer.modules() for layer in layers))


def _program(layers: Sequence[StackLayer], rows: int) -> Program:
    program = _empty(layers, rows)
    for layer in layers:
        states = [mixer.init_state(rows, 0, "meta") for mixer in layer.mixers]  # type: ignore[operator]
        slots = pytree.tree_map_only(Tensor, lambda leaf: program.state(leaf.shape[1:]), states)
        program.include(layer, program.input, slots)
    program.finish()
    return program


def _unsupported(layer: StackLayer, rows: int) -> str | None:
    try:
        _program([layer], rows)
    except Unserved as reason:
        return str(reason)
    return None


def explain(layers: Sequence[StackLayer]) -> list[str]:
    """For each layer, whether one token of it is compiled, or why not."""
    return [_unsupported(layer, 1) or "compiled" for layer in layers]
