"""What a layer does for one token, as a graph of torch's operations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from seqarch.ops.native.view import Amount, Unserved

LEAST = 2
"""Of a whole number that stands for others: torch takes 0 and 1 for themselves, as sizes of their own kind."""

FUNCTIONS = {"FloorDiv": lambda a, b: a // b, "Mod": lambda a, b: a % b, "Max": max, "Min": min}
"""Of whole numbers, by the names that torch has for them beside those of sympy."""


_ALONE = Lock()
"""While torch writes a graph down, it says so to all threads, and two would not take that back."""


@dataclass(frozen=True)
class Captured:
    """A layer's step.

    Attributes:
        graph: takes the input and the state's leaves, gives the output and the new state's leaves.
        symbols: of the leaves that are whole numbers, by their place.
        holds: whether the graph is right for such whole numbers, in the order of ``symbols``.
        structure: of the state.
    """

    graph: fx.GraphModule
    symbols: Mapping[int, sympy.Symbol]
    holds: Callable[..., bool]
    structure: pytree.TreeSpec

    @property
    def inputs(self) -> list[fx.Node]:
        return [node for node in self.graph.graph.nodes if node.op == "placeholder"]

    def function(self, amounts: Sequence[Amount]) -> Callable[..., list[int]]:
        """These expressions of ``symbols`` as one function of them."""
        return _function(list(self.symbols.values()), amounts)


def capture(layer: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor, state: Any) -> Captured:
    """The step of a layer for an ``x`` and a state like these: values of tensors are not read.

    Raises:
        Unserved: what it does depends on the values of tensors, or cannot be written down for another reason.
    """
    leaves, structure = pytree.tree_flatten(state)
    shapes = ShapeEnv()
    fake = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    symbols, inputs = dict[int, sympy.Symbol](), []
    for i, leaf in enumerate(leaves):
        if type(leaf) is int:
            if leaf < LEAST:
                raise Unserved(f"a whole number of the state is below {LEAST}")
            source = ConstantSource(f"leaf_{i}")
            symbol = shapes.create_symbol(leaf, source=source, dynamic_dim=DimDynamic.DYNAMIC)
            assert isinstance(symbol, sympy.Symbol)
            inputs.append(shapes.create_symintnode(symbol, hint=leaf, source=source))
            symbols[i] = symbol
        else:
            inputs.append(_like(fake, leaf) if isinstance(leaf, Tensor) else leaf)

    def step(x: Tensor, *leaves: Any) -> tuple[Tensor, list[Any]]:
        y, after = layer(x, pytree.tree_unflatten(list(leaves), structure))
        return y, pytree.tree_leaves(after)

    try:
        with _ALONE, torch.no_grad(), fake, _silenced():
            graph = make_fx(step, tracing_mode="real", _allow_non_fake_inputs=True)(_like(fake, x), *inputs)
    except Exception as error:  # whatever torch, or somebody's layer, says to tensors without values
        reason = (str(error).strip().splitlines() or ["it says nothing"])[0]
        raise Unserved(f"its step cannot be captured: {type(error).__name__}: {reason}") from error
    graph.graph.eliminate_dead_code(_is_wanted)
    return Captured(graph, symbols, _holds(shapes, list(symbols.values())), structure)


@contextmanager
def _silenced() -> Iterator[None]:
    """Torch logs what fails with a traceback, which is no news here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _like(fake: FakeTensorMode, tensor: Tensor) -> Tensor:
    return fake.from_tensor(tensor.detach(), static_shapes=True)


def _is_wanted(node: fx.Node) -> bool:
    """Whether a node is wanted even if nobody uses its result."""
    changes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return node.op in ("placeholder", "output") or changes


def _holds(shapes: ShapeEnv, symbols: list[sympy.Symbol]) -> Callable[..., bool]:
    """Whether all that was asked of the whole numbers while the step was captured has the same answer."""
    asked = [guard.expr for guard in shapes.guards if guard.expr.free_symbols]
    answers = _function(symbols, asked)
    return lambda *values: all(value >= LEAST for value in values) and all(answers(*values))


def _function(symbols: list[sympy.Symbol], amounts: Sequence[Amount]) -> Callable[..., list[Any]]:
    return sympy.lambdify(symbols, list(amounts), modules=[FUNCTIONS, "math"])
