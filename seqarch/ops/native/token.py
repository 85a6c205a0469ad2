"""One token through many layers in a single call of the compiled library (``csrc/cpu/token.cpp``).

A :class:`Program` is a list of instructions that layers write once, each in its method ``one_token``, which says in
instructions what its ``forward`` says in torch. Running it costs what reading the weights costs; the same token in some
twenty calls per layer costs as much again. Programs hold addresses of parameters, so one is good for as long as
:meth:`Program.hold` says.

The library runs while other threads do, so a finished program is only read: each run has a :class:`_Workspace` to
itself, with the memory of the values and the instructions that name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from seqarch.ops.dispatch.eager import is_plain
from seqarch.ops.native import cpu_library

MOST_ROWS = 4
"""Sequences of a batch; from 8 on torch's products of matrices are as fast."""

unavailable = cpu_library.unavailable

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
"""An operand of an instruction; a tensor is a parameter."""

Place = Value | Slot | int | None
"""Where that lies; a number is the address of a parameter."""


def _owner(kind: type, method: str) -> type | None:
    return next((base for base in kind.__mro__ if method in vars(base)), None)


class Program:
    """Instructions for one token of each of ``rows`` sequences, from an input of some width.

    ``modules`` are all those that take part, and :meth:`hold` compares with what they were.
    """

    def __init__(self, rows: int, width: int, modules: Iterable[nn.Module]):
        self.rows = rows
        self.slots: list[Slot] = []
        self.complete = False
        self._written: list[tuple[int, int, float, int, tuple[int, int], tuple[Place, ...]]] = []
        self._size = self._used = 0
        self._workspaces: list[_Workspace] = []
        self._watch = _Watch(modules)
        self.input = self.value(width)

    def include(self, module: nn.Module, *arguments: Any) -> Any:
        """The result of ``module.one_token(program, *arguments)``, in place of a call of the module.

        Raises:
            Unserved: it has no such method, or calling it does more than that says: by hooks, or by a forward pass
                that a subclass or somebody else has changed.
        """
        kind = type(module)
        own = _owner(kind, "one_token")
        # What says the same in torch: a mixer writes ``mix`` or ``exchange``, other modules ``forward``.
        computed = [_owner(kind, each) for each in ("forward", "mix", "exchange")]
        if own is None or not all(each is None or issubclass(own, each) for each in computed):
            raise Unserved(f"{kind.__name__} has no instructions for one token")
        if not is_plain(module):
            raise Unserved(f"{kind.__name__} has hooks, or a forward pass of its own")
        return module.one_token(self, *arguments)  # type: ignore[operator]

    def value(self, width: int, rows: int | None = None) -> Value:
        """Memory for a value."""
        value = Value(self._used, width, width)
        self._used += -(-(rows or self.rows) * width // _LINE) * _LINE
        self._size = max(self._size, self._used)
        return value

    def state(self, shape: Sequence[int]) -> Slot:
        self.slots.append(Slot(len(self.slots), torch.Size((self.rows, *shape))))
        return self.slots[-1]

    def forget(self, value: Value) -> None:
        """Use the memory of all values that came after this one again."""
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

    def convolve(self, x: Value, weight: Tensor, bias: Tensor | None, state: Source, activation: str | None) -> Value:
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
        self, x: Value, dt: Value, A: Value, B: Value, C: Value, D: Tensor | None, z: Value | None, state: Source
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
        places = tuple(self._watch.take(each) if isinstance(each, Tensor) else each for each in operands)
        self._written.append((kind, _ACTIVATIONS[activation], factor, rows or self.rows, sizes, places))

    def finish(self) -> None:
        """To be called once, before the first run: nothing is written after it."""
        self._shapes = [slot.shape for slot in self.slots]
        self.complete = True

    def hold(self) -> list[UntypedStorage] | None:
        """The parameters' memory, to be kept while the program runs: another thread may give a parameter other memory.

        ``None`` where the layers are no longer as they were when they wrote the program, or could not.
        """
        return self._watch.hold(self.complete)

    def run(self, x: Tensor, states: Sequence[Tensor]) -> Tensor | None:
        """The output for ``x [rows, 1, width]``, and the states replaced in place; any number of threads may.

        ``None`` where states do not fit, or layers had no instructions, so that the program was never finished.
        """
        if not self.complete:
            return None
        if list(map(_shape, states)) != self._shapes or any(map(_needed, states)) or not all(map(_plain, states)):
            return None
        try:
            workspace = self._workspaces.pop()
        except IndexError:  # as many runs are under way as there are workspaces
            workspace = _Workspace(self._written, self._size, self.input.width, self.rows, len(self.slots))
        y = workspace.run(x, states)
        self._workspaces.append(workspace)
        return y


class _Workspace:
    """The memory of one run's values, and its instructions with their addresses."""

    def __init__(self, written: Sequence[tuple[Any, ...]], size: int, width: int, rows: int, slots: int):
        self.memory = torch.zeros(size)
        self.input = self.memory[: rows * width].view(rows, 1, width)
        self.instructions = cpu_library.array("instruction", len(written))
        self.states: list[list[Any]] = [[] for _ in range(slots)]
        self.addresses: list[int] = []
        for instruction, each in zip(self.instructions, written, strict=True):
            *plain, sizes, places = each
            instruction.kind, instruction.activation, instruction.factor, instruction.rows = plain
            instruction.sizes[:] = sizes
            for operand, place in zip(instruction.operands, places, strict=False):
                if isinstance(place, Slot):
                    self.states[place.number].append(operand)
                elif isinstance(place, Value):
                    operand.data, operand.stride = self.memory.data_ptr() + 4 * place.first, place.stride
                elif place is not None:
                    operand.data = place

    def run(self, x: Tensor, states: Sequence[Tensor]) -> Tensor:
        addresses = list(map(Tensor.data_ptr, states))
        if addresses != self.addresses:
            self.addresses = addresses
            for operands, address in zip(self.states, addresses, strict=True):
                for operand in operands:
                    operand.data = address
        self.input.copy_(x)
        cpu_library.call("run_token", self.instructions, cpu_library.int64(len(self.instructions)))
        return self.input.clone()


_shape, _needed = attrgetter("shape"), attrgetter("requires_grad")


def _plain(tensor: Tensor) -> bool:
    """Whether its numbers are float32 that lie side by side in this process's memory."""
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()


class _Watch:
    """The sources of a program: modules, their hooks, submodules, numbers and names, and the parameters' memory.

    It is asked at every token, when its own data has left the cache: the fewer objects it looks at, the better.
    Nothing in it changes once the program is written.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self.modules = list(modules)
        self.sizes = [len(vars(module)) for module in self.modules]
        entries = [
            (owner, name)
            for module in self.modules
            for owner in (vars(module), module._parameters, module._modules)
            for name, value in list(owner.items())
            if isinstance(value, (Tensor, nn.Module, float, str))
        ]
        self.owners, self.names = (list(each) for each in zip(*entries, strict=True))
        self.values = list(map(getitem, self.owners, self.names))
        self.hooks: list[Any] = [each for m in self.modules for each in (m._forward_hooks, m._forward_pre_hooks)]
        self.counts = list(map(len, self.hooks))
        self.tensors: list[Tensor] = []
        self.addresses: list[int] = []

    def take(self, parameter: Tensor) -> int:
        """Its address."""
        if type(parameter) is not nn.Parameter or not _plain(parameter):  # others may be computed, and gone tomorrow
            raise Unserved(f"a parameter is a {type(parameter).__name__} of {parameter.dtype} on {parameter.device}")
        self.tensors.append(parameter)
        self.addresses.append(parameter.data_ptr())
        return self.addresses[-1]

    def hold(self, complete: bool) -> list[UntypedStorage] | None:
        """See :meth:`Program.hold`; none of the modules of a complete program has hooks."""
        memory = list(map(Tensor.untyped_storage, self.tensors))  # first: what is kept stays where it is found next
        same = (
            (not any(self.hooks) if complete else list(map(len, self.hooks)) == self.counts)
            and list(map(len, map(vars, self.modules))) == self.sizes
            and all(map(is_, map(dict.get, self.owners, self.names), self.values))
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )
        return memory if same else None
