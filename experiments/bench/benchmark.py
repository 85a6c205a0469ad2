"""A benchmark: some work, its implementations, and the modes in which a call of theirs is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from experiments.bench.sizes import Setup, Sizes
from seqarch import ops
from seqarch.ops import OPS

Inputs = dict[str, Any]
Call = Callable[..., Any]
Clock = AbstractContextManager[Any]
"""Its blocks are what is timed."""

Work = Callable[[Clock], None]
"""Does the work once; the clock runs in that part of it that counts."""

AUTO = "auto"
"""The implementation that is whatever backend the operation would choose; not shown beside the backends themselves."""

TOKEN = "one token"
PASSES = ("forward", "forward + backward")


class Absent(Exception):
    """Why an implementation cannot run on this machine."""


@dataclass(frozen=True)
class Implementation:
    """Something that does a benchmark's work.

    Attributes:
        bind: from the benchmark's inputs, the call and the inputs that it takes by keyword. It may raise
            :class:`Absent` or ``ImportError``.
        forward_only: whether it has no backward pass, or none that is worth a wait.
    """

    bind: Callable[[Inputs], tuple[Call, Inputs]]
    forward_only: bool = False


@dataclass(frozen=True)
class Cost:
    """Of a call: its floating-point operations, and the bytes that it must read or write once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Workload:
    """A computation: the arguments of a call by keyword, and the cost of the forward call with them."""

    inputs: Callable[[Sizes], Inputs]
    cost: Callable[[Sizes, Inputs], Cost]


@dataclass(frozen=True)
class Benchmark:
    """One piece of work and its implementations.

    Attributes:
        title: what is computed, with the names of sizes in braces (:meth:`Setup.describe`).
        workload: what is called, in all modes but that of :attr:`token`.
        ours: this library's implementations by name.
        baselines: the others, by the kind of device; it runs on these kinds. Ratios are to the first.
        modes: the names of the :data:`MODES` in which it is timed.
        token: one token after many others, where that is timed too.
        longest: lengths beyond it are no part of the benchmark.
    """

    title: str
    workload: Workload
    ours: Mapping[str, Implementation]
    baselines: Mapping[str, Mapping[str, Implementation]]
    modes: tuple[str, ...] = PASSES
    token: Workload | None = None
    longest: float = math.inf

    def implementations(self, setup: Setup) -> dict[str, Implementation]:
        """All that a kind of device can be asked for, first the one that ratios are to."""
        ours = {name: one for name, one in self.ours.items() if not name.endswith(setup.skipped)}
        return {**self.baselines[setup.kind], **ours}

    def shown(self, setup: Setup, mode: str) -> list[str]:
        """The implementations of a table."""
        able = self.implementations(setup).items()
        return [name for name, one in able if name != AUTO and not (one.forward_only and MODES[mode].backward)]

    def inputs(self, mode: str, sizes: Sizes) -> Inputs:
        return self._workload(mode).inputs(sizes)

    def cost(self, mode: str, sizes: Sizes, inputs: Inputs) -> Cost:
        return MODES[mode].cost(self._workload(mode).cost(sizes, inputs))

    def work(self, name: str, mode: str, setup: Setup, inputs: Inputs) -> Work:
        """The work of one implementation, ready to be timed.

        Raises:
            Absent: it cannot run here, with the reason.
        """
        try:
            call, own = self.implementations(setup)[name].bind(inputs)
        except ImportError as error:
            raise Absent(str(error)) from error
        return MODES[mode].prepare(call, own)

    def _workload(self, mode: str) -> Workload:
        return self.token if mode == TOKEN and self.token else self.workload


@dataclass(frozen=True)
class Mode:
    """A way to time a call, and what that costs in forward calls: by convention a backward pass is two of them.

    Bytes are those of inputs and outputs; with a backward pass gradients are as many again.
    """

    prepare: Callable[[Call, Inputs], Work]
    flops: float = 1
    bytes: float = 1
    backward: bool = False

    def cost(self, forward: Cost) -> Cost:
        return Cost(self.flops * forward.flops, self.bytes * forward.bytes)


def timed(call: Call, inputs: Inputs) -> Work:
    """The call, from its beginning to its end."""

    def work(clock: Clock) -> None:
        with clock:
            call(**inputs)

    return work


def _forward(call: Call, inputs: Inputs) -> Work:
    return torch.no_grad()(timed(call, inputs))


def _forward_backward(call: Call, inputs: Inputs) -> Work:
    """With the gradients of all inputs that have one; making the output's own is not timed.

    Gradients are kept until the next call, which finds their memory free: freed at the end, they go back to the system,
    and the next call would have to map as much anew.
    """
    leaves = {
        name: value.detach().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }

    def work(clock: Clock) -> None:
        for leaf in leaves.values():
            if torch.is_tensor(leaf):
                leaf.grad = None
        with clock:
            output = call(**leaves)
        cotangent = torch.ones_like(output).contiguous()
        with clock:
            output.backward(cotangent)

    return work


MODES = {
    "forward": Mode(_forward),
    "forward + backward": Mode(_forward_backward, flops=3, bytes=2, backward=True),
    "training step": Mode(timed, flops=3, bytes=3, backward=True),
    TOKEN: Mode(_forward),
}


def backend(op: str, name: str) -> Implementation:
    """A backend of ours, or what :data:`AUTO` chooses."""

    def call(**inputs: Any) -> torch.Tensor:
        output = getattr(ops, op)(**inputs, backend=name)
        return output[0] if isinstance(output, tuple) else output

    def bind(inputs: Inputs) -> tuple[Call, Inputs]:
        if name != AUTO and (reason := OPS[op].backends[name].unsupported(OPS[op].inputs(**inputs))):
            raise Absent(reason)
        return call, inputs

    return Implementation(bind)


def of_operation(
    op: str,
    title: str,
    inputs: Callable[[Sizes], Inputs],
    flops: Callable[[Sizes, Inputs], float],
    baselines: Mapping[str, Mapping[str, Implementation]],
    output: str = "v",
    token: Workload | None = None,
    modes: tuple[str, ...] = PASSES,
) -> Benchmark:
    """The benchmark of all backends of an operation; ``output`` names the input of the output's shape."""

    def cost(sizes: Sizes, inputs: Inputs) -> Cost:
        tensors = [value for value in (*inputs.values(), inputs[output]) if torch.is_tensor(value)]
        return Cost(flops(sizes, inputs), sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    ours = {name: backend(op, name) for name in (*OPS[op].backends, AUTO)}
    return Benchmark(title, Workload(inputs, cost), ours, baselines, modes, token)
