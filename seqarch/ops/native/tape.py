"""One token through many layers in a single call of the compiled library (``csrc/cpu/tape.cpp``).

A :class:`Tape` is a list of instructions on views of memory: of values of its own, of parameters, of the state, and of
tables that torch makes for each token. It holds addresses of parameters, so it is good for as long as these stay.

The library runs while other threads do, so a tape that is run is only read: each run has a :class:`Workspace` to
itself, with the memory of the values and the instructions that name it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.native import cpu_library
from seqarch.ops.native.quantized_linear import FORMATS
from seqarch.ops.native.view import Amount, Buffer, Unserved, View, merged, numel, side_by_side

# The numbers of the header, csrc/include/seqarch.h.
KINDS = (
    *("map", "elementwise", "reduce", "product", "convolution", "scan", "linear_attention", "delta_rule", "attend"),
    *("lookup", "argmax", "attend_join"),
)
CODES = (
    *("copy", "add", "multiply", "divide", "affine", "over", "maximum", "minimum", "clamp", "where", "less"),
    *("less_equal", "equal", "not", "absolute", "sqrt", "rsqrt", "exp", "sigmoid", "silu", "softplus", "power", "tanh"),
    *("log", "log1p", "expm1", "sin", "cos", "erf", "floor", "sign", "remainder"),
)
REDUCTIONS = ("sum", "maximum", "minimum")
DTYPES = cpu_library.DTYPES | {torch.int64: 5}

LINE = 16
"""Numbers of a line of the cache: values begin at one."""

MOST_REGISTERS = 32
"""Inputs and steps of an elementwise instruction."""

DIMS = 5
"""Dimensions of a view in an instruction."""

unavailable = cpu_library.unavailable


@dataclass(frozen=True)
class Step:
    """A step of an elementwise instruction. Sources: an input's number, or of step k the number ``-k - 1``."""

    code: str
    a: int
    b: int | None = None
    c: int | None = None
    number: float = 0.0
    other: float = 0.0


COPY = (Step("copy", 0),)


@dataclass(frozen=True)
class Operand:
    """A view in an instruction, with the strides that it reads."""

    buffer: Buffer
    offset: Amount
    strides: tuple[Amount, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Instruction:
    kind: str
    operands: tuple[Operand | None, ...]
    sizes: tuple[Amount, ...]
    flags: int = 0
    factor: float = 1.0
    outputs: int = 0
    steps: tuple[Step, ...] = ()
    results: tuple[int, ...] = ()
    scope: int = 0

    def amounts(self) -> Iterator[Amount]:
        """All of it that may change from token to token."""
        for operand in self.operands:
            if operand is not None:
                yield from (operand.offset, *operand.strides)
        yield from self.sizes


class Tape:
    """Instructions, written once.

    Attributes:
        scope: of the instructions that are being written: what changes from token to token has a value in each.

        limit: the largest that what changes from token to token may be, for which values have room.
        tensors: of parameters, by their buffer.
        numbers: the whole numbers that each token has a value for, by scope.
        wanted: addresses that are fetched after the run.

    Args:
        take: gives the address of a parameter.
    """

    scope = 0

    def __init__(self, take: Callable[[Tensor], int]):
        self.instructions: list[Instruction] = []
        self.fills: list[tuple[View, float | Tensor]] = []
        self.numbers: list[tuple[int, Amount]] = []
        self.wanted: list[int] = []
        self.tables = self.used = self.size = self.lasting = 0
        self.limit: Callable[[Amount], int] = int
        self.tensors: dict[Buffer, Tensor] = {}
        self._take, self._parameters = take, dict[int, Buffer]()

    def value(self, sizes: Sequence[Amount], wide: bool = False) -> View:
        """Memory for a value of these sizes."""
        room = [size if isinstance(size, int) else self.limit(size) for size in sizes]
        buffer = Buffer("value", self.used)
        self.used += -(-max(numel(room), 1) * (1 + wide) // LINE) * LINE
        self.size = max(self.size, self.used)
        return View(buffer, 0, tuple(sizes), side_by_side(room), _float(wide))

    def parameter(self, tensor: Tensor) -> View:
        """A parameter, which lies where it is when the tape is run."""
        key = id(tensor)
        if key not in self._parameters:
            self._parameters[key] = buffer = Buffer("parameter", self._take(tensor))
            self.tensors[buffer] = tensor
        dtype = tensor.dtype if tensor.dtype == torch.bfloat16 else torch.float32
        return View(self._parameters[key], 0, tuple(tensor.shape), tuple(tensor.stride()), dtype)

    def table(self, sizes: Sequence[Amount], wide: bool = False) -> View:
        """Numbers without gaps that are given to each run."""
        self.tables += 1
        return View(Buffer("table", self.tables - 1), 0, tuple(sizes), side_by_side(sizes), _float(wide))

    def filled(self, sizes: Sequence[Amount], numbers: float | Tensor, wide: bool = False) -> View:
        """A number again and again, or those of a tensor, in memory of its own: it stays until written over."""
        used, self.used = self.used, self.lasting
        view = self.value(sizes, wide)
        self.lasting, self.used = self.used, used
        view = replace(view, buffer=Buffer("lasting", view.buffer.what))
        self.fills.append((view, numbers))
        return view

    def number(self, amount: Amount) -> View:
        """A whole number that each token has a value for."""
        name = (self.scope, amount)
        if name not in self.numbers:
            self.numbers.append(name)
        return View(Buffer("number", self.numbers.index(name)), 0, (), (), torch.float64)

    def dense(self, view: View, dims: int) -> View:
        """It, or a copy, so that the numbers of the last dimensions lie side by side."""
        return view if view.is_dense(dims) else self.copy(view)

    def copy(self, view: View, to: View | None = None) -> View:
        to = self.value(view.sizes, view.wide) if to is None else to
        self.elementwise([to], [view.expanded(to.sizes)], COPY, [-1])
        return to

    def write(
        self, kind: str, operands: Sequence[tuple[View, Sequence[int]] | None], sizes: Sequence[Amount],
        flags: int = 0, factor: float = 1.0, stored: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """An instruction on views of float32, of each the dimensions whose strides it reads; those whose places are in
        ``stored`` may be of another type."""
        found = [None if each is None else _operand(*each, is_stored=i in stored) for i, each in enumerate(operands)]
        self._append(kind, found, sizes, flags, factor)

    def _append(self, kind: str, operands: Sequence[Operand | None], sizes: Sequence[Amount], *others: Any) -> None:
        named = dict(zip(("flags", "factor", "outputs", "steps", "results"), others, strict=False))
        self.instructions.append(Instruction(kind, tuple(operands), tuple(sizes), scope=self.scope, **named))

    def amounts(self, scope: int) -> list[Amount]:
        """What changes from token to token in a scope."""
        found = (amount for each in self.instructions if each.scope == scope for amount in each.amounts())
        return list(dict.fromkeys(amount for amount in found if not isinstance(amount, int)))

    def elementwise(
        self, outputs: Sequence[View], inputs: Sequence[View], steps: Sequence[Step], results: Sequence[int]
    ) -> None:
        """``outputs`` are the results of these steps on inputs of the same sizes."""
        views = [*outputs, *inputs]
        if 0 in (sizes := outputs[0].sizes):
            return
        strides = list(zip(*(view.strides for view in views), strict=True)) if sizes else []
        dims = merged(list(zip(sizes, strides, strict=True))) or [(1, (1,) * len(views))]
        if len(dims) > DIMS or len(inputs) + len(steps) > MOST_REGISTERS:
            raise Unserved("an elementwise operation has too many parts")
        inner = max(range(len(dims)), key=lambda d: (_is_worth_going_inside(*dims[d]), d))
        dims.append(dims.pop(inner))
        dims = [(1, (0,) * len(views))] * (DIMS - len(dims)) + dims
        operands = [Operand(v.buffer, v.offset, tuple(own[i] for _, own in dims), v.dtype) for i, v in enumerate(views)]
        wide = any(view.wide for view in views)
        sizes = [size for size, _ in dims]
        self._append("elementwise", operands, sizes, int(wide), 1.0, len(outputs), tuple(steps), tuple(results))

    def reduce(self, kind: str, to: View, view: View, dims: Sequence[int], factor: float = 1.0) -> None:
        """``to``, without gaps, is the sum or an extreme of ``view`` over some dimensions, times ``factor``."""
        if view.dtype != torch.float32:
            raise Unserved(f"a reduction of {view.dtype}")
        kept = [(view.sizes[d], view.strides[d]) for d in range(view.rank) if d not in dims and view.sizes[d] != 1]
        gone = merged([(view.sizes[d], (view.strides[d],)) for d in dims])
        if len(kept) > 3 or len(gone) > 2:
            raise Unserved("a reduction has too many dimensions")
        inside = [(1, 0)] * (2 - len(gone)) + [(size, stride) for size, (stride,) in gone]
        outside = [(1, 0)] * (3 - len(kept)) + kept
        strides = (0,) * (3 - len(kept)) + side_by_side([size for size, _ in kept])
        whole = Operand(view.buffer, view.offset, tuple(stride for _, stride in outside + inside))
        sizes = [size for size, _ in outside + inside]
        self._append("reduce", [Operand(to.buffer, to.offset, strides), whole], sizes, REDUCTIONS.index(kind), factor)

    def product(self, to: View, a: View, b: View) -> None:
        """``to [..., M, N] = a [..., M, K] b [..., K, N]`` of at most two dimensions more."""
        views = [view.expanded((1,) * (4 - view.rank) + view.sizes) for view in (to, a, b)]
        self.write("product", [(view, range(4)) for view in views], [*views[0].sizes, views[1].sizes[3]])

    def map(self, to: View, x: View, weight: View, bias: View | None) -> None:
        """``to [M, N] = x [M, K] weight^T + bias``, weight ``[N, K]`` of float32 or bfloat16 without gaps, x's rows
        without gaps too."""
        operands = (to, (0, 1)), (x, (0,)), (weight, ()), None if bias is None else (bias, ())
        self.write("map", operands, [*x.sizes, weight.sizes[0]], DTYPES[weight.dtype], stored=(2,))

    def look_up(self, to: View, index: View, weight: View) -> None:
        """``to [R, D] = weight[index]``: an index ``[R]`` of whole numbers, a weight ``[V, D]`` of float32 or bfloat16
        without gaps."""
        self.write("lookup", [(to, (0,)), (index, (0,)), (weight, ())], [*to.sizes, weight.sizes[0]], stored=(1, 2))

    def argmax(self, to: View, x: View) -> None:
        """``to [R]``, as float64, is the place of the largest number of each row of ``x [R, V]``, rows without gaps."""
        self.write("argmax", [(to, (0,)), (x, (0,))], x.sizes, stored=(0,))

    def quantized_map(self, to: View, x: View, codes: Tensor, scales: Tensor, bias: View | None) -> None:
        """The same of weights by their codes and scales, as :mod:`seqarch.ops.native.quantized_linear` takes them."""
        added = None if bias is None else (bias, ())
        held = [(self.parameter(each), ()) for each in (codes, scales)]
        operands = (to, (0, 1)), (x, (0,)), held[0], added, held[1]
        self.write("map", operands, [*x.sizes, len(codes), scales.shape[1]], FORMATS[codes.dtype])


def _operand(view: View, dims: Sequence[int], is_stored: bool = False) -> Operand:
    if view.dtype != torch.float32 and not is_stored:
        raise Unserved(f"an instruction does not take {view.dtype}")
    return Operand(view.buffer, view.offset, tuple(view.strides[d] for d in dims), view.dtype)


def _float(wide: bool) -> torch.dtype:
    return torch.float64 if wide else torch.float32


def _is_worth_going_inside(size: Amount, strides: tuple[Amount, ...]) -> int:
    """0 for a short dimension; of a long one, how many views have its numbers side by side, and one more."""
    return 1 + sum(stride == 1 for stride in strides) if isinstance(size, int) and size >= 2 * LINE else 0


class Workspace:
    """The memory of one run's values, and its instructions with their addresses."""

    def __init__(self, tape: Tape):
        self.memory, self.lasting = torch.zeros(tape.size), torch.zeros(tape.lasting)
        for view, numbers in tape.fills:
            self.tensor(view).copy_(torch.as_tensor(numbers))
        self.names, self.numbers = tape.numbers, (cpu_library.float64 * len(tape.numbers))()
        operands = [(each.scope, operand) for each in tape.instructions for operand in each.operands]
        steps = [step for each in tape.instructions for step in _steps(each)]
        self.instructions = cpu_library.array("tape_instruction", len(tape.instructions))
        self._instruction_bytes = cpu_library.size(self.instructions) // max(len(self.instructions), 1)
        self.views = cpu_library.array("view", len(operands))
        self.steps = cpu_library.array("step", len(steps))
        self.registers: dict[tuple[Any, Any], int] = {}
        self._fixed: list[tuple[int, int, int, int]] = []
        self._states: list[tuple[Any, int, Operand, int]] = []
        self._lay_out(tape)
        for place, (scope, operand) in zip(self.views, operands, strict=True):
            if operand is not None:
                self._place(place, operand, scope)
        for to, (code, *sources, number, other) in zip(self.steps, steps, strict=True):
            to.code, to.number, to.other = code, number, other
            to.a, to.b, to.c = sources
        self.addresses: list[int] | None = None
        self.wanted = (cpu_library.int64 * len(tape.wanted))(*tape.wanted)

    def tensor(self, view: View) -> Tensor:
        """A value as torch sees it."""
        memory = self.memory if view.buffer.kind == "value" else self.lasting
        first = view.buffer.what
        if view.wide:
            memory, first = memory.view(view.dtype), first // 2
        return memory.as_strided(view.sizes, view.strides, first + view.offset)

    def begin(self, states: Sequence[Tensor], amounts: Mapping[tuple[int, Amount], int]) -> None:
        """Take a token's state, which is replaced in place, and what changes from token to token, by scope."""
        addresses = list(map(Tensor.data_ptr, states))
        if addresses != self.addresses:
            self._bind(addresses)
        for name, number in self.registers.items():
            if name[0] != "table":
                self.values[number] = amounts[name]
        for place, name in enumerate(self.names):
            self.numbers[place] = amounts[name]

    def run(self, first: int, last: int, tables: Mapping[int, Tensor]) -> None:
        """Run the instructions from one on until another one.

        Args:
            tables: those that are new since the instructions before, without gaps.
        """
        for number, tensor in tables.items():
            if ("table", number) in self.registers:
                self.values[self.registers["table", number]] = tensor.data_ptr()
        self.whole.instructions = cpu_library.address(self.instructions) + first * self._instruction_bytes
        self.whole.count = last - first
        self.whole.wanted_count = len(self.wanted) if last == len(self.instructions) else 0
        cpu_library.call("run_tape", cpu_library.reference(self.whole), self.values)

    def _lay_out(self, tape: Tape) -> None:
        operands = steps = 0
        for to, each in zip(self.instructions, tape.instructions, strict=True):
            to.kind, to.flags, to.factor = KINDS.index(each.kind), each.flags, each.factor
            to.views, to.steps = operands, steps
            to.outputs, to.inputs, to.count = each.outputs, len(each.operands) - each.outputs, len(each.steps)
            for d, size in enumerate(each.sizes):
                self._set(to.sizes, d, (each.scope, size))
            operands, steps = operands + len(each.operands), steps + len(each.steps) + len(each.results)

    def _place(self, place: Any, operand: Operand, scope: int) -> None:
        for d, stride in enumerate(operand.strides):
            self._set(place.strides, d, (scope, stride))
        kind, what = operand.buffer.kind, operand.buffer.what
        place.dtype = DTYPES[operand.dtype]
        field = cpu_library.address(place)
        if kind == "state":
            self._states.append((place, what, operand, scope))
        elif not isinstance(operand.offset, int):
            raise Unserved("a part of a value that moves from token to token is read")
        elif kind == "table":
            self._fixed.append((field, operand.dtype.itemsize * operand.offset, 1, self._register(("table", what))))
        elif kind == "number":
            place.data = cpu_library.address(self.numbers) + operand.dtype.itemsize * what
        else:
            memory = {"value": self.memory, "lasting": self.lasting}
            first = what if kind == "parameter" else memory[kind].data_ptr() + 4 * what
            place.data = first + operand.dtype.itemsize * operand.offset

    def _set(self, fields: Any, d: int, amount: tuple[int, Amount]) -> None:
        """Set a field, now or for each token."""
        if isinstance(amount[1], int):
            fields[d] = amount[1]
        else:
            self._fixed.append((cpu_library.address(fields) + 8 * d, 0, 1, self._register(amount)))

    def _register(self, name: tuple[Any, Any]) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def _bind(self, addresses: list[int]) -> None:
        patches = list(self._fixed)
        for place, number, operand, scope in self._states:
            first, offset = addresses[number], operand.offset
            if isinstance(offset, int):
                place.data = first + operand.dtype.itemsize * offset
            else:
                field = cpu_library.address(place)
                patches.append((field, first, operand.dtype.itemsize, self._register((scope, offset))))
        self.patches = cpu_library.array("patch", len(patches))
        for to, (field, base, factor, number) in zip(self.patches, patches, strict=True):
            to.field, to.base, to.factor, to.number = field, base, factor, number
        self.values = (cpu_library.int64 * max(len(self.registers), 1))()
        (self.whole,) = cpu_library.array("tape", 1)
        for name in ("views", "steps", "patches", "wanted"):
            setattr(self.whole, name, cpu_library.address(getattr(self, name)))
        self.whole.patch_count = len(patches)
        self.addresses = addresses


def _steps(instruction: Instruction) -> list[tuple[Any, ...]]:
    """As the library has them: sources counted from the first input on, and a copy to each output at the end."""
    inputs = len(instruction.operands) - instruction.outputs

    def place(source: int | None) -> int:
        return -1 if source is None else source if source >= 0 else inputs - source - 1

    steps = [
        (CODES.index(step.code), place(step.a), place(step.b), place(step.c), step.number, step.other)
        for step in instruction.steps
    ]
    return [*steps, *((0, place(result), -1, -1, 0.0, 0.0) for result in instruction.results)]
