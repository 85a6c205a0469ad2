"""Sequence parallelism: each process holds a slice of the sequence and hands its state on to the next process.

Any split of a sequence gives the same result (:class:`seqarch.layers.Mixer`). So a stack runs on slices that lie on
different processes if each layer starts from the state which the process before ended with, and gradients go back along
the same edges. That is right for every mixer; what differs is how much is handed on: ``[H, K, V]`` numbers per row by a
recurrence, ``w - 1`` keys and values by a window of w, all earlier ones by full attention. It is
``stack.state_bytes(length)`` in all, with the length up to the end of the slice, and as much again for the gradients.

A process works on one layer while the next one works on the layer below, so P processes take the time of ``L + P - 1``
layers of a slice for L of them. Several calls before one backward pass, as ``[model(rows)[0] for rows in x.chunk(M)]``,
make it ``M L + P - 1`` layers of an Mth of the rows each: a pipeline.

Passing a recurrence's state on is Li et al. 2024/2025, "LASP: Linear Attention Sequence Parallelism", without its
split of a layer's work into parts that need the state and parts that do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from seqarch.models.stack import Stack, StackState
from seqarch.models.stack_layer import INPUT, StackLayer, run_layer
from seqarch.models.streams import first


@contextmanager
def sequence_parallel(model: nn.Module, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Within this, every stack in ``model`` sees a slice of the sequence and takes part in a relay over the group.

    The slices are in the order of the ranks; they may differ in length. Every process must make the same calls, and
    backward passes (within or after) through all of them or none. The state that a call returns is that after the
    process's slice, so the last process can resume from it alone.

    Parameters are whole on every process, and each gets its slice's part of the gradient: :func:`sum_gradients`.
    Sharding them over the same processes (FSDP) would make each layer wait for all; shard over others. Losses that
    routers add are those of a process's own tokens. Activation checkpointing must wrap layers, not the whole stack.

    Args:
        model: a stack, or a module that holds stacks such as a language model.
        group: the processes; by default all.

    Raises:
        ValueError: there is no stack in the model.
    """
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    if not stacks:
        raise ValueError(f"sequence_parallel: {type(model).__name__} holds no Stack")
    before = [stack.schedule for stack in stacks]
    for stack in stacks:
        stack.schedule = Relay(group)
    try:
        yield
    finally:
        for stack, schedule in zip(stacks, before, strict=True):
            stack.schedule = schedule


def own_slice(x: Tensor, group: dist.ProcessGroup | None = None, dim: int = 1) -> Tensor:
    """This process's part of ``x [B, T, ...]``: near-equal slices along time, in the order of the ranks."""
    return x.tensor_split(dist.get_world_size(group), dim)[dist.get_rank(group)]


def sum_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Add up each parameter's gradient over the group; where no process has one, it stays ``None``.

    Right where each process's loss is its tokens' part of the whole loss, as the sum over them by the number of all.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    used = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)
    used = used.to(trained[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group)
    for parameter, is_used in zip(trained, used.tolist(), strict=True):
        if is_used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)


class Relay:
    """Runs the layers of a stack from the states of the process before, and hands theirs on to the next."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._before = Edge(group, rank - 1) if rank else None
        self._next = Edge(group, rank + 1) if rank + 1 < size else None

    def __call__(
        self, layers: Sequence[StackLayer], x: Tensor, state: StackState | None, cu_seqlens: Any, token_mask: Any = None
    ) -> tuple[Tensor, StackState]:
        """As :func:`seqarch.models.stack.in_turn`, for this process's slice.

        Raises:
            ValueError: sequences are packed, or a process other than the first was given a state.
        """
        if cu_seqlens is not None:
            raise ValueError("sequence_parallel: packed sequences (cu_seqlens) cannot be split over processes")
        if state is not None and self._before is not None:
            raise ValueError("sequence_parallel: a state was given, but only the first process may start from one")
        after = []
        handed: Mapping[str, Any] = {INPUT: first(x)}  # of this process's tokens, as its layers take it
        for i, layer in enumerate(layers):
            before: Any = (None,) * len(layer.mixers) if state is None else state[i]
            if self._before is not None:
                x, before = receive(x, self._before)
            x, carried, handed = run_layer(layer, x, before, None, token_mask, None, handed)
            if self._next is not None:
                x = send(x, carried, self._next)
            after.append(carried)
        return x, tuple(after)


@dataclass(frozen=True)
class Edge:
    """The way to another process of a group; whoever sends waits until the other one takes it."""

    group: dist.ProcessGroup | None
    rank: int

    def send(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.numel():
                dist.send(tensor.detach().contiguous(), group=self.group, group_dst=self.rank)

    def receive(self, shapes: Iterable[Tensor], device: torch.device) -> list[Tensor]:
        """Tensors like these, which hold no numbers themselves."""
        tensors = [torch.empty(shape.shape, dtype=shape.dtype, device=device) for shape in shapes]
        for tensor in tensors:
            if tensor.numel():
                dist.recv(tensor, group=self.group, group_src=self.rank)
        return tensors


def send(x: Tensor, state: Any, edge: Edge) -> Tensor:
    """Hand a state on. The result is ``x``; passing backward through it waits for the gradient of the state."""
    tensors = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors))
    outline = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().to("meta"), state)
    dist.send_object_list([outline, differentiable], group=edge.group, group_dst=edge.rank)
    return _Send.apply(edge, x, *tensors)  # type: ignore[return-value]


def receive(x: Tensor, edge: Edge) -> tuple[Tensor, Any]:
    """The state that :func:`send` handed on, beside ``x``; passing backward through both returns its gradient."""
    received: list[Any] = [None, None]
    dist.recv_object_list(received, group=edge.group, group_src=edge.rank)
    outline, differentiable = received
    leaves, structure = pytree.tree_flatten(outline)
    shapes = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    # the other process waits for a gradient even where nothing before this layer needs one here
    anchor = torch.empty(0, device=x.device, requires_grad=bool(differentiable))
    x, *tensors = _Receive.apply(edge, differentiable, shapes, anchor, x)  # type: ignore[misc]
    rest = iter(tensors)
    return x, pytree.tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


class _Send(torch.autograd.Function):
    """Both functions let ``x`` through, which puts their backward passes into the order of the layers."""

    @staticmethod
    def forward(ctx: Any, edge: Edge, x: Tensor, *tensors: Tensor) -> Tensor:
        edge.send(tensors)
        ctx.edge, ctx.shapes = edge, [tensor.to("meta") for tensor in tensors]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        (used,) = ctx.edge.receive([torch.empty(len(ctx.shapes), dtype=torch.uint8, device="meta")], dx.device)
        used = used.tolist()
        shapes = [shape for shape, is_used in zip(ctx.shapes, used, strict=True) if is_used]
        gradients = iter(ctx.edge.receive(shapes, dx.device))
        return None, dx, *(next(gradients) if is_used else None for is_used in used)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, edge: Edge, differentiable: bool, shapes: list[Tensor], anchor: Tensor, x: Tensor
    ) -> tuple[Tensor, ...]:
        tensors = edge.receive(shapes, x.device)
        ctx.edge, ctx.differentiable = edge, differentiable
        ctx.mark_non_differentiable(*(each for each in tensors if not (differentiable and each.is_floating_point())))
        ctx.set_materialize_grads(False)
        return x.view_as(x), *tensors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.differentiable:
            used = torch.tensor([each is not None for each in gradients], dtype=torch.uint8, device=dx.device)
            ctx.edge.send([used, *(each for each in gradients if each is not None)])
        return None, None, None, None, dx
