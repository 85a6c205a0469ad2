"""What is measured: a contest, its contestants, and the ways in which a call of theirs is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from seqarch.ops import OPS

Inputs = dict[str, Any]
Call = Callable[..., Any]
Runner = Callable[[], float]
"""Does the work once and returns the seconds that it took."""

AUTO = "auto"
"""The contestant that is whatever backend the operation would choose; not shown beside the backends themselves."""

LENGTHS = tuple(2**exponent for exponent in range(9, 17))


class Absent(Exception):
    """Why a contestant cannot take part on this machine."""


@dataclass(frozen=True)
class Contestant:
    """Someone who does a contest's work.

    Attributes:
        enter: from the contest's inputs, the call and the inputs that it takes by keyword. It may raise
            :class:`Absent` or ``ImportError``.
        forward_only: whether it has no backward pass, or none that is worth a wait.
    """

    enter: Callable[[Inputs], tuple[Call, Inputs]]
    forward_only: bool = False


@dataclass(frozen=True)
class Cost:
    """Of one forward call: its floating-point operations, and the bytes that it must read or write once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Contest:
    """One piece of work and who does it.

    Attributes:
        title: the sizes, for people.
        inputs: from a length and a dtype, the arguments by keyword.
        contestants: by name; ratios are to the first.
        cost: of the forward call with these inputs.
        ways: the names of the :data:`WAYS` in which it is timed.
        longest: lengths beyond it are no part of the contest.
    """

    title: str
    inputs: Callable[[int, torch.dtype], Inputs]
    contestants: Mapping[str, Contestant]
    cost: Callable[[Inputs], Cost]
    ways: tuple[str, ...] = ("forward", "forward + backward")
    longest: int = LENGTHS[-1]

    def shown(self, way: str) -> list[str]:
        """The contestants of a table, first the one that ratios are to."""
        able = [name for name, one in self.contestants.items() if not (one.forward_only and way != "forward")]
        return [name for name in able if name != AUTO]

    def runner(self, name: str, way: str, inputs: Inputs) -> Runner:
        """The work of one contestant, ready to be timed.

        Raises:
            Absent: it cannot take part, with the reason.
        """
        try:
            call, own = self.contestants[name].enter(inputs)
        except ImportError as error:
            raise Absent(str(error)) from error
        return WAYS[way].prepare(call, own)


@dataclass(frozen=True)
class Way:
    """How a call is timed, and what that costs in forward calls: by convention a backward pass is two of them.

    Bytes are those of inputs and outputs; with a backward pass gradients are as many again.
    """

    prepare: Callable[[Call, Inputs], Runner]
    flops: float
    bytes: float

    def cost(self, forward: Cost) -> Cost:
        return Cost(self.flops * forward.flops, self.bytes * forward.bytes)


def _forward(call: Call, inputs: Inputs) -> Runner:
    return torch.no_grad()(timed(call, inputs))


def _forward_backward(call: Call, inputs: Inputs) -> Runner:
    leaves = {
        name: value.detach().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }

    def run() -> float:
        for leaf in leaves.values():
            if torch.is_tensor(leaf):
                leaf.grad = None
        start = time.perf_counter()
        output = call(**leaves)
        between = time.perf_counter()
        cotangent = torch.ones_like(output).contiguous()
        again = time.perf_counter()
        output.backward(cotangent)
        return time.perf_counter() - again + between - start

    return run


def timed(call: Call, inputs: Inputs) -> Runner:
    """The call, from its beginning to its end."""

    def run() -> float:
        start = time.perf_counter()
        call(**inputs)
        return time.perf_counter() - start

    return run


WAYS = {
    "forward": Way(_forward, 1, 1),
    "forward + backward": Way(_forward_backward, 3, 2),
    "training step": Way(timed, 3, 3),
    "one token": Way(_forward, 1, 1),
}


def backend(op: str, name: str) -> Contestant:
    """A backend of ours, or what :data:`AUTO` chooses."""

    def call(**inputs: Any) -> torch.Tensor:
        output = OPS[op](name, **inputs)
        return output[0] if isinstance(output, tuple) else output

    def enter(inputs: Inputs) -> tuple[Call, Inputs]:
        if name != AUTO and (reason := OPS[op].backends[name].unsupported(OPS[op].inputs(**inputs))):
            raise Absent(reason)
        return call, inputs

    return Contestant(enter)


def of_operation(
    op: str,
    title: str,
    inputs: Callable[[int, torch.dtype], Inputs],
    flops: Callable[[Inputs], float],
    peers: Mapping[str, Contestant],
    output: str,
) -> Contest:
    """The contest of all backends of an operation and its peers; ``output`` names the input of the output's shape."""
    backends = {name: backend(op, name) for name in (*OPS[op].backends, AUTO)}

    def cost(inputs: Inputs) -> Cost:
        tensors = [value for value in (*inputs.values(), inputs[output]) if torch.is_tensor(value)]
        return Cost(flops(inputs), sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    return Contest(title, inputs, {**peers, **backends}, cost)
