"""Custom operators around a pair of kernels: ``torch.compile`` leaves each whole, and autograd knows both derivatives:
the first by the second kernel, higher ones by torch's own functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import BackendError
from seqarch.ops.dispatch.eager import transform

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Engine:
    """Two C functions of ``seqarch.h`` or ``seqarch_cuda.h``, and what to know of them.

    Attributes:
        forward, backward: the functions, called in the header's order, but for the number of threads or the stream.
        numbers: the header's number of each dtype.
        offsets: what the functions take for ``cu_seqlens``.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
    numbers: dict[torch.dtype, int]
    offsets: Callable[[Sequence[int] | None, torch.device], Any]


@dataclass(frozen=True)
class Formula:
    """How an operator is differentiated.

    Attributes:
        gradients: takes a :class:`Saved` and the gradients of the results, and gives those of the inputs, the first
            ones of them: the rest have none.
        plain: the results of the operator's inputs, by functions of torch's that have derivatives of any kind. A
            backward pass that is itself differentiated (``create_graph``), batched or transformed differentiates this.
        results: how many of the outputs have a gradient, the first ones.
        keeps: which outputs the gradients are computed from.
    """

    gradients: Callable[..., Sequence[Tensor | None]]
    plain: Callable[..., Any]
    results: int = 1
    keeps: tuple[int, ...] = ()


class Saved(NamedTuple):
    """What a backward pass has of the call: all its inputs, the outputs kept, and which inputs want a gradient."""

    inputs: list[Any]
    kept: tuple[Tensor, ...]
    needed: tuple[bool, ...]


_SAVED = object()
"""Stands for an input that is saved as a tensor."""


def define(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    outputs: Callable[..., Any],
    gradients: Callable[..., Any],
    formula: Formula,
    devices: str | Sequence[str] | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operators ``seqarch::NAME``, differentiable, and ``seqarch::NAME_backward``.

    Args:
        forward, backward: what they compute; their annotations are the operators' schemas, and nothing is written to.
        outputs, gradients: tensors of the shapes, dtypes and devices that these return, of the same arguments.
        formula: how the first is differentiated, in which the second takes part.
        devices: the types of device that they run on; ``None``: any.
    """
    operator = torch.library.custom_op(f"seqarch::{name}", forward, mutates_args=(), device_types=devices)
    gradient = torch.library.custom_op(f"seqarch::{name}_backward", backward, mutates_args=(), device_types=devices)
    operator.register_fake(outputs)
    gradient.register_fake(gradients)
    differentiate(operator, formula)
    return operator, gradient


def differentiate(operator: Any, formula: Formula) -> None:
    """Tell autograd how a custom operator is differentiated."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        output = (output,) if isinstance(output, Tensor) else output
        if len(output) > formula.results:
            ctx.mark_non_differentiable(*output[formula.results :])
            ctx.set_materialize_grads(False)  # zeros as large as what is kept would be made for nothing
            ctx.results = [(each.shape, each.dtype, each.device) for each in output[: formula.results]]
        ctx.inputs = [_SAVED if isinstance(each, Tensor) else each for each in inputs]
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        ctx.save_for_backward(*tensors, *[output[i] for i in formula.keeps])

    def derive(ctx: Any, *upstream: Tensor | None) -> Gradients:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if each is _SAVED else each for each in ctx.inputs]
        upstream = upstream[: formula.results]
        device = next((each.device for each in upstream if each is not None), None)
        if device is None:
            return (None,) * len(inputs)
        call = Saved(inputs, tuple(saved), ctx.needs_input_grad)
        with without_autocast(device):  # of whoever calls backward within its own
            if torch.is_grad_enabled() or transform() is not None:
                return _by_torch(formula.plain, call, upstream)
            missing = any(each is None for each in upstream)
            given = _filled(upstream, ctx.results) if missing else upstream
            found = formula.gradients(call, *given)
        return *found, *[None] * (len(inputs) - len(found))

    operator.register_autograd(derive, setup_context=save)


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


def _by_torch(plain: Callable[..., Any], call: Saved, upstream: Sequence[Tensor | None]) -> Gradients:
    """The gradients as functions of inputs and ``upstream`` that autograd and transforms can follow."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: gradients stop at them, and their own derivatives go on to the inputs
        inputs = [x.view_as(x) if needed else x for x, needed in zip(call.inputs, call.needed, strict=True)]
        results = plain(*inputs)
        results = (results,) if isinstance(results, Tensor) else results
        pairs = [(y, dy) for y, dy in zip(results, upstream, strict=True) if dy is not None and y.requires_grad]
        wanted = [x for x, needed in zip(inputs, call.needed, strict=True) if needed]
        if not pairs:
            return (None,) * len(inputs)
        ends, starts = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ends, wanted, starts, create_graph=again, allow_unused=True))
    return tuple(next(found) if needed else None for needed in call.needed)
