"""One token through many layers in a single call of the compiled library (``csrc/cpu/token.cpp``).

A :class:`Program` is a list of instructions that layers write once, each in its method ``one_token``, which says in
instructions what its ``forward`` says in torch. Running it costs what reading the weights costs; the same token in some
twenty calls a layer costs as much again. Programs hold addresses of parameters, so one is good for as long as
:meth:`Program.holds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import eq, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from seqarch.ops.common import native
from seqarch.ops.common.native import Instructions, int64

MOST_ROWS = 4
"""Sequences of a batch; from 8 on torch's products of matrices are as fast."""

unavailable = native.unavailable

_run = native.Kernel("run_token", Instructions, int64)

# The numbers of the header, csrc/include/seqarch.h.
_NORM, _LINEAR, _CONVOLVE, _POINTWISE, _SCAN = range(5)
_ACTIVATIONS = {None: 0, "silu": 1, "exp": 2}
_LINE = 16
"""Numbers of a line of the cache: values begin at one."""


class Unserved(Exception):
    """A layer has no instructions, and why."""


@dataclass(frozen=True)
class Value:
    """Numbers in a program's memory: ``width`` of each row, rows ``stride`` apart."""

    first: int
    width: int
    stride: int

    def split(self, sizes: Sequence[int]) -> list[Value]:
        starts = accumulate(sizes, initial=self.first)
        return [Value(start, size, self.stride) for start, size in zip(starts, sizes, strict=False)]


@dataclass(frozen=True)
class Slot:
    """A tensor of the state, ``[rows, ...]``, by its place among those that :meth:`Program.run` is given."""

    number: int
    shape: torch.Size


Source = Value | Slot | Tensor | None
"""What an instruction reads or writes; a tensor is a parameter."""


def _owner(kind: type, method: str) -> type | None:
    return next((base for base in kind.__mro__ if method in vars(base)), None)


class Program:
    """Instructions for one token of each of ``rows`` sequences, from an input of some width."""

    def __init__(self, rows: int, width: int):
        self.rows = rows
        self.slots: list[Slot] = []
        self._written: list[tuple[int, int, float, int, tuple[int, int], tuple[Source, ...]]] = []
        self._room = self._used = 0
        self._watch = _Watch()
        self.input = self.value(width)

    def include(self, module: nn.Module, *arguments: Any) -> Any:
        """What ``module.one_token(program, *arguments)`` returns, in place of a call of the module.

        Raises:
            Unserved: it has no such method, or calling it does more than that says: by hooks, or by a forward pass
                that a subclass or somebody else has changed.
        """
        kind = type(module)
        own, computed = _owner(kind, "one_token"), _owner(kind, "forward")
        if own is None or computed is None or not issubclass(own, computed):
            raise Unserved(f"{kind.__name__} has no instructions for one token")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise Unserved(f"{kind.__name__} has hooks, or a forward pass of its own")
        self._watch.add(module)
        return module.one_token(self, *arguments)  # type: ignore[operator]

    def value(self, width: int, rows: int | None = None) -> Value:
        """Room for a value."""
        value = Value(self._used, width, width)
        self._used += -(-(rows or self.rows) * width // _LINE) * _LINE
        self._room = max(self._room, self._used)
        return value

    def state(self, shape: Sequence[int]) -> Slot:
        self.slots.append(Slot(len(self.slots), torch.Size((self.rows, *shape))))
        return self.slots[-1]

    def forget(self, value: Value) -> None:
        """Use the room of all values that came after this one again."""
        self._used = value.first + -(-self.rows * value.stride // _LINE) * _LINE

    def norm(self, x: Value, weight: Tensor | None, eps: float) -> Value:
        y = self.value(x.width)
        self._write(_NORM, (x.width, 1), y, x, weight, factor=eps)
        return y

    def linear(self, x: Value, weight: Tensor, bias: Tensor | None, add_to: Value | None = None) -> Value:
        """``x weight^T + bias``, or that added to a value."""
        y = self.value(len(weight)) if add_to is None else add_to
        self._write(_LINEAR, (x.width, len(weight)), y, x, weight, bias, add_to)
        return y

    def convolve(self, x: Value, weight: Tensor, bias: Tensor | None, state: Slot, activation: str | None) -> Value:
        y = self.value(x.width)
        channels, taps = weight.shape
        self._write(_CONVOLVE, (channels, taps), y, x, weight, bias, state, activation=activation)
        return y

    def pointwise(self, activation: str | None, x: Value, z: Value | None = None) -> Value:
        """``f(x) z``."""
        y = self.value(x.width)
        self._write(_POINTWISE, (x.width, 0), y, x, z, activation=activation)
        return y

    def negative_exp(self, parameter: Tensor) -> Value:
        """``-exp`` of a parameter, the same for all rows."""
        y = self.value(parameter.numel(), rows=1)
        self._write(_POINTWISE, (parameter.numel(), 0), y, parameter, activation="exp", factor=-1.0, rows=1)
        return y

    def scan(
        self, x: Value, dt: Value, A: Value, B: Value, C: Value, D: Tensor | None, z: Value | None, state: Slot
    ) -> Value:
        """A step of the selective scan with ``softplus(dt)``."""
        y = self.value(x.width)
        self._write(_SCAN, (x.width, B.width), y, x, dt, B, C, A, D, z, state)
        return y

    def _write(
        self, kind: int, sizes: tuple[int, int], *operands: Source, activation: str | None = None,
        factor: float = 1.0, rows: int | None = None
    ) -> None:  # fmt: skip
        if activation not in _ACTIVATIONS:
            raise Unserved(f"no instruction has the activation {activation}")
        for each in operands:
            if isinstance(each, Tensor):
                self._watch.take(each)
        self._written.append((kind, _ACTIVATIONS[activation], factor, rows or self.rows, sizes, operands))

    def finish(self) -> None:
        """To be called once, before the first run: gives values their memory and operands their addresses."""
        self._memory = torch.zeros(self._room)
        self._input = self._memory[: self.rows * self.input.width].view(self.rows, 1, self.input.width)
        self._instructions = Instructions.of_length(len(self._written))
        self._states: list[list[Any]] = [[] for _ in self.slots]
        for instruction, written in zip(self._instructions, self._written, strict=True):
            *plain, sizes, operands = written
            instruction.kind, instruction.activation, instruction.factor, instruction.rows = plain
            instruction.sizes[:] = sizes
            for operand, source in zip(instruction.operands, operands, strict=False):
                if isinstance(source, Slot):
                    self._states[source.number].append(operand)
                elif isinstance(source, Value):
                    operand.data, operand.stride = self._memory.data_ptr() + 4 * source.first, source.stride
                elif source is not None:
                    operand.data = source.data_ptr()

    def holds(self) -> bool:
        """Whether the layers are as they were when they wrote it."""
        return self._watch.holds()

    def run(self, x: Tensor, states: Sequence[Tensor]) -> Tensor | None:
        """The output for ``x [rows, 1, width]``, and the states replaced in place; ``None`` where they do not fit."""
        for slot, operands, state in zip(self.slots, self._states, states, strict=True):
            if state.shape != slot.shape or not _plain(state) or state.requires_grad:
                return None
            for operand in operands:
                operand.data = state.data_ptr()
        self._input.copy_(x)
        _run(self._instructions, len(self._instructions))
        return self._input.clone()


def _plain(tensor: Tensor) -> bool:
    """Whether its numbers are float32 that lie side by side in this process's memory."""
    return tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"


class _Watch:
    """What a program was written from: the attributes, submodules and parameters of modules."""

    def __init__(self) -> None:
        self.owners: list[dict[str, Any]] = []
        self.sizes: list[int] = []
        self.names: list[tuple[dict[str, Any], str]] = []
        self.values: list[Any] = []
        self.tensors: list[Tensor] = []
        self.addresses: list[int] = []

    def add(self, module: nn.Module) -> None:
        hooks: Any = module._forward_hooks, module._forward_pre_hooks
        for owner in (vars(module), module._parameters, module._modules, *hooks):
            self.owners.append(owner)
            self.sizes.append(len(owner))
            public = [name for name in owner if not name.startswith("_")]
            self.names += [(owner, name) for name in public]
            self.values += [owner[name] for name in public]

    def take(self, parameter: Tensor) -> None:
        if type(parameter) not in (Tensor, nn.Parameter) or not _plain(parameter):
            raise Unserved(f"a parameter is a {type(parameter).__name__} of {parameter.dtype} on {parameter.device}")
        self.tensors.append(parameter)
        self.addresses.append(parameter.data_ptr())

    def holds(self) -> bool:
        return (
            all(map(eq, map(len, self.owners), self.sizes))
            and all(map(is_, (owner[name] for owner, name in self.names), self.values))
            and all(map(eq, map(Tensor.data_ptr, self.tensors), self.addresses))
        )
