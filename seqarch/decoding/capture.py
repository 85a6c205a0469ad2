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
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from seqarch.decoding.decompositions import DECOMPOSITIONS
from seqarch.decoding.form import CAPACITY, has_capacity
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
        tensors: parameters, buffers and constants, by the names that the graph has for them.
        symbols: of the numbers that may change (:func:`seqarch.decoding.form.numbers_of`), in their order.
        holds: whether the graph is right for such numbers.
    """

    graph: fx.Graph
    tensors: Mapping[str, Tensor]
    symbols: list[sympy.Symbol]
    holds: Callable[..., bool]

    @property
    def inputs(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def function(self, amounts: Sequence[Amount]) -> Callable[..., list[int]]:
        """These expressions of ``symbols`` as one function of them."""
        return _function(self.symbols, amounts)


def capture(layer: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor, state: Any) -> Captured:
    """The step of a layer for an ``x`` and a state like these: values of tensors are not read.

    Raises:
        Unserved: what it does depends on the values of tensors, or cannot be written down for another reason.
    """
    leaves, structure = pytree.tree_flatten(state)
    shapes = ShapeEnv()
    fake = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    inputs = [_input(fake, shapes, i, leaf, leaves) for i, leaf in enumerate(leaves)]
    changing = [each if isinstance(each, torch.SymInt) else _room(each) for each in inputs]
    symbols = [each.node.expr for each in changing if each is not None]

    def step(x: Tensor, *leaves: Any) -> tuple[Tensor, list[Any]]:
        y, after = layer(x, pytree.tree_unflatten(list(leaves), structure))
        return y, pytree.tree_leaves(after)

    try:
        with _ALONE, torch.no_grad(), fake, _silenced():
            trace = make_fx(step, DECOMPOSITIONS, tracing_mode="real", _allow_non_fake_inputs=True)
            graph = trace(_like(fake, x), *inputs)
    except Exception as error:  # whatever torch, or somebody's layer, says to tensors without values
        reason = (str(error).strip().splitlines() or ["it says nothing"])[0]
        raise Unserved(f"its step cannot be captured: {type(error).__name__}: {reason}") from error
    graph.graph.eliminate_dead_code(_is_wanted)
    names = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    tensors = {name: getattr(graph, name) for name in names}
    return Captured(graph.graph, tensors, symbols, _holds(shapes, symbols))


def _input(fake: FakeTensorMode, shapes: ShapeEnv, number: int, leaf: Any, leaves: Sequence[Any]) -> Any:
    """A leaf without its values, with symbols for what may change."""
    source = ConstantSource(f"leaf_{number}")
    if type(leaf) is int:
        if leaf < LEAST:
            raise Unserved(f"a whole number of the state is below {LEAST}")
        symbol = shapes.create_symbol(leaf, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        return shapes.create_symintnode(symbol, hint=leaf, source=source)
    if not isinstance(leaf, Tensor):
        return leaf
    if not has_capacity(leaf, leaves):
        return _like(fake, leaf)
    sizes = [DimDynamic.DYNAMIC if d == CAPACITY else DimDynamic.STATIC for d in range(leaf.ndim)]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return fake.from_tensor(leaf.detach(), source=source, symbolic_context=context)


def _room(value: Any) -> torch.SymInt | None:
    """The capacity of a cache, as a symbol."""
    if not isinstance(value, Tensor) or value.ndim <= CAPACITY:
        return None
    size = value.shape[CAPACITY]
    return size if isinstance(size, torch.SymInt) else None


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
