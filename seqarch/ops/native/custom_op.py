"""Custom operators around a pair of kernels: ``torch.compile`` keeps each whole, and autograd knows both derivatives:
the first by the second kernel, higher ones by torch's own functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import BackendError
from seqarch.ops.dispatch.eager import active_transform, has_dispatch_mode, is_batched, is_eager
from seqarch.ops.dispatch.inputs import Inputs
from seqarch.ops.native.huge_pages import like

Gradients = tuple[Tensor | None, ...]
I = TypeVar("I", bound=Inputs)

SCHEMA = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "bool": "bool", "int": "SymInt", "float": "float", "str": "str",
    "tuple[int, ...]": "SymInt[]", "tuple[int, ...] | None": "SymInt[]?",
}  # fmt: skip
"""The types of fields as operators' schemas write them."""


@dataclass(frozen=True)
class KernelPair:
    """Two C functions of ``seqarch.h`` or ``seqarch_cuda.h``, and what to know of them.

    Attributes:
        forward, backward: the functions, called with the fields of each of the header's structures that they take.
        numbers: the header's number of each dtype.
        offsets: what the functions take for ``cu_seqlens``.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
    numbers: dict[torch.dtype, int]
    offsets: Callable[[Sequence[int] | None, torch.device], Any]


class Upstream(NamedTuple):
    """The arguments of a backward pass beside the inputs of the call.

    Attributes:
        kept: the outputs that were kept for it.
        gradients: those of the results.
        needed: for each field of the inputs whether its gradient is wanted.
    """

    kept: Sequence[Tensor]
    gradients: Sequence[Tensor]
    needed: Sequence[bool]


def empty_gradients(inputs: Inputs, upstream: Upstream | None = None) -> list[Tensor]:
    """A tensor like each of the inputs' tensors, uninitialised and contiguous; without elements for ``None`` and for
    what is not floating point."""
    tensors = (getattr(inputs, name) for name in inputs.tensor_fields())
    return [torch.empty(0) if each is None or not each.is_floating_point() else like(each) for each in tensors]


def as_given(inputs: Inputs, found: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of the inputs' tensors in their dtypes and shapes; without elements for ``None``."""
    given = (getattr(inputs, name) for name in inputs.tensor_fields())
    return [
        torch.empty(0) if each is None or one is None else one.to(each.dtype).view(each.shape)
        for each, one in zip(given, found, strict=True)
    ]


OPERATORS: dict[str, Operator[Any]] = {}
"""By name, as their operations are imported."""


class Operator(Generic[I]):
    """The custom operator ``seqarch::NAME`` of some inputs, differentiable, and ``seqarch::NAME_backward``.

    Args:
        name: of the operator, after ``seqarch::``.
        kind: the class of the inputs; its fields are the operator's arguments.
        forward: computes the outputs; nothing is written to its inputs.
        backward: the gradients of the inputs' tensors, in the order of the fields; without elements: none.
        plain: the results by torch's own functions, which have derivatives of any kind. A backward pass that is itself
            differentiated (``create_graph``), batched or transformed differentiates this.
        outputs, gradients: tensors of the shapes, dtypes and devices that ``forward`` and ``backward`` return.
        results: how many of the outputs have a gradient, the first ones.
        keeps: which outputs the backward pass takes.
        devices: the types of device that it runs on; ``None``: any.
    """

    def __init__(
        self,
        name: str,
        kind: type[I],
        forward: Callable[[I], Any],
        backward: Callable[[I, Upstream], Sequence[Tensor]],
        plain: Callable[[I], Any],
        outputs: Callable[[I], Any],
        gradients: Callable[[I, Upstream], Sequence[Tensor]] = empty_gradients,
        results: int = 1,
        keeps: tuple[int, ...] = (),
        devices: str | Sequence[str] | None = None,
    ):
        self.kind, self.plain, self.outputs, self.results, self.keeps = kind, plain, outputs, results, keeps
        OPERATORS[name] = self
        self.places = [kind.__match_args__.index(field) for field in kind.tensor_fields()]
        arguments, custom_op, names = _schema(kind), torch.library.custom_op, kind.__match_args__
        returns = get_type_hints(forward)["return"]
        count = 1 if returns is Tensor else len(returns.__args__)
        # Tensors one by one: a backward pass that is batched takes no lists of them.
        above = [*(f"Tensor kept_{place}" for place in keeps), *(f"Tensor upstream_{n}" for n in range(results))]

        def with_upstream(compute: Callable[[I, Upstream], Sequence[Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
            def run(*values: Any) -> tuple[Tensor, ...]:
                *given, needed = values
                own, rest = given[: -len(above)], given[-len(above) :]
                return tuple(compute(kind(*own), Upstream(rest[: len(keeps)], rest[len(keeps) :], needed)))

            return run

        def run(*values: Any) -> Any:
            return forward(kind.make(zip(names, values, strict=True)))

        self.forward, self.backward = run, with_upstream(backward)
        self.operator = custom_op(
            f"seqarch::{name}", run, mutates_args=(), device_types=devices,
            schema=f"({arguments}) -> {_tensors(count)}",
        )  # fmt: skip
        self.gradient = custom_op(
            f"seqarch::{name}_backward", self.backward, mutates_args=(), device_types=devices,
            schema=f"({', '.join([arguments, *above])}, bool[] needed) -> {_tensors(len(self.places))}",
        )  # fmt: skip
        self.gradient.register_fake(with_upstream(gradients))
        self.operator.register_fake(lambda *values: outputs(kind(*values)))
        self.operator.register_autograd(self._derive, setup_context=self._save)

    def __call__(self, inputs: I) -> Any:
        values = inputs.values()
        return _Unregistered.apply(self, *values) if _is_unwatched(values) else self.operator(*values)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        output = (output,) if isinstance(output, Tensor) else output
        if len(output) > self.results:
            ctx.mark_non_differentiable(*output[self.results :])
            ctx.set_materialize_grads(False)  # zeros as large as what is kept would be made for nothing
            ctx.results = [(each.shape, each.dtype, each.device) for each in output[: self.results]]
        ctx.inputs = [_SAVED if isinstance(each, Tensor) else each for each in inputs]
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        ctx.save_for_backward(*tensors, *[output[i] for i in self.keeps])

    def _derive(self, ctx: Any, *upstream: Tensor | None) -> Gradients:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if each is _SAVED else each for each in ctx.inputs]
        kept, needed, upstream = list(saved), list(ctx.needs_input_grad)[-len(inputs) :], upstream[: self.results]
        device = next((each.device for each in upstream if each is not None), None)
        if device is None:
            return (None,) * len(inputs)
        with without_autocast(device):  # of whoever calls backward within its own
            if torch.is_grad_enabled() or active_transform() is not None:
                return by_torch(lambda *values: self.plain(self.kind(*values)), inputs, needed, upstream)
            missing = any(each is None for each in upstream)
            given = _filled(upstream, ctx.results) if missing else list(upstream)
            arguments = (*inputs, *kept, *given, needed)
            found = self.backward(*arguments) if _is_unwatched(arguments) else self.gradient(*arguments)
        gradients: list[Tensor | None] = [None] * len(inputs)
        for place, gradient in zip(self.places, found, strict=True):
            gradients[place] = gradient if needed[place] else None
        return tuple(gradients)


class _Unregistered(torch.autograd.Function):
    """The operator without its registration, whose dispatch takes longer than a short sequence's kernel.

    A compiler, dispatch modes and tensors of other types need to be told of a call; nobody else does.
    """

    @staticmethod
    def forward(ctx: Any, operator: Operator[Any], *values: Any) -> Any:
        output = operator.forward(*values)
        ctx.operator = operator
        operator._save(ctx, values, output)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:  # type: ignore[override]
        return None, *ctx.operator._derive(ctx, *upstream)


def _is_unwatched(values: Sequence[Any]) -> bool:
    """Whether these are a CPU's plain tensors, and calls on them are run just as they are made."""
    tensors = [each for each in values if isinstance(each, Tensor)]
    return (
        is_eager(tensors[0].device)
        and all(type(each) in _PLAIN and each.is_cpu and not is_batched(each) for each in tensors)
        and not has_dispatch_mode()
    )


_PLAIN = (Tensor, torch.nn.Parameter)
_SAVED = object()
"""Stands for an input that is saved as a tensor."""


def _tensors(count: int) -> str:
    """So many results, as a schema says it."""
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _schema(kind: type[Inputs]) -> str:
    """The fields of a class of inputs as an operator's arguments."""
    return ", ".join(f"{SCHEMA[str(field.type)]} {field.name}" for field in fields(kind))


def first_derivatives_only(kernels: str, others: str, *outputs: Tensor) -> None:
    """Have a backward pass through these outputs raise where it is to be differentiated again.

    Kernels outside of torch would be constants there, in silence; torch's own raise an error that names neither the
    operation nor the way out.
    """

    def check(_: Tensor) -> None:
        if torch.is_grad_enabled():
            raise BackendError(f"{kernels} has first derivatives only (create_graph=True asks for others): {others}")

    for each in outputs:
        if each.requires_grad and not torch.compiler.is_compiling():
            each.register_hook(check)


def _filled(upstream: Sequence[Tensor | None], results: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """Zeros for what no gradient came to."""
    return [
        torch.zeros(shape, dtype=dtype, device=device) if each is None else each
        for each, (shape, dtype, device) in zip(upstream, results, strict=True)
    ]


def by_torch(
    plain: Callable[..., Any], values: Sequence[Any], needed: Sequence[bool], upstream: Sequence[Tensor | None]
) -> Gradients:
    """The gradients as functions of inputs and ``upstream`` that autograd and transforms can follow.

    Args:
        plain: the results by torch's own functions.
        values: its arguments.
        needed: for each of them whether its gradient is wanted.
        upstream: the gradients of the results.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: gradients stop at them, and their own derivatives go on to the inputs
        inputs = [x.view_as(x) if want else x for x, want in zip(values, needed, strict=True)]
        results = plain(*inputs)
        results = (results,) if isinstance(results, Tensor) else results
        pairs = [(y, dy) for y, dy in zip(results, upstream, strict=True) if dy is not None and y.requires_grad]
        wanted = [x for x, want in zip(inputs, needed, strict=True) if want]
        if not pairs:
            return (None,) * len(inputs)
        ends, starts = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ends, wanted, starts, create_graph=again, allow_unused=True))
    return tuple(next(found) if want else None for want in needed)
