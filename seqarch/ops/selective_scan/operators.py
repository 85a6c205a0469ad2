"""Compiled kernels of the selective scan as custom operators: what the C++ and the CUDA backend share.

Step size, skip and gate are computed inside a kernel. The backward pass computes a chunk's decays and states again from
the state before it, which the forward pass keeps: memory is ``O(T D + T D N / C)``, with gradients alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import sequence_count
from seqarch.ops.native.custom_op import Engine, Formula, Saved, define
from seqarch.ops.native.huge_pages import in_huge_pages, like
from seqarch.ops.selective_scan import recurrent_torch

Pair = tuple[Tensor, Tensor]


def rows(m: Tensor) -> Tensor:
    """``[B, T, ...]`` in which a token's elements lie side by side: the tensor itself or a copy."""
    side_by_side = m.stride(-1) == 1 and (m.ndim == 3 or m.stride(2) == m.shape[3])
    return m if side_by_side else m.contiguous()


def chunks(x: Tensor, cu_seqlens: Sequence[int] | None, size: int) -> int:
    """Chunks of all sequences."""
    if cu_seqlens is None:
        return x.shape[0] * -(-x.shape[1] // size)
    return sum(-(-(end - start) // size) for start, end in pairwise(cu_seqlens))


class Operators:
    """The forward and the backward operator of an engine, with their fakes and the autograd formula.

    Args:
        name: of the forward operator, after ``seqarch::``.
        chunk: C, the tokens between two states that are kept.
        device: the type of device that it runs on; ``None``: any.
    """

    def __init__(self, name: str, engine: Engine, chunk: int, device: str | None):
        self.engine, self.chunk = engine, chunk
        self.forward, self.backward = define(
            name, self._forward, self._backward, self._room, self._room_for_gradients,
            Formula(self._gradients, _plain, results=2, keeps=(2,)), device,
        )  # fmt: skip

    def run(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        scale_input: bool,
        state: Tensor,
        offsets: tuple[int, ...] | None,
    ) -> Pair:
        D, dt_bias = (None if m is None else m.to(state.dtype) for m in (D, dt_bias))
        inputs = x, dt, A.to(state.dtype), B, C, D, z, dt_bias, state
        keep = torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in inputs)
        y, last, _ = self.forward(*inputs, dt_softplus, scale_input, keep, offsets)
        return y, last

    def _problem(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        softplus: bool,
        scale_input: bool,
        cu_seqlens: Sequence[int] | None,
    ) -> tuple[Any, ...]:
        inputs = [None if m is None else rows(m) for m in (x, dt, B, C, z)]
        parameters = [None if m is None else m.contiguous() for m in (A, D, dt_bias)]
        sizes = sequence_count(x, cu_seqlens), *x.shape[1:], A.shape[1], B.shape[2], self.chunk
        offsets = self.engine.offsets(cu_seqlens, x.device)
        return self.engine.numbers[A.dtype], *inputs, *parameters, offsets, *sizes, softplus, scale_input

    def _forward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        state: Tensor,
        softplus: bool,
        scale_input: bool,
        keep: bool,
        cu_seqlens: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, the last state and, to ``keep`` for the backward pass, the state before each chunk."""
        options = softplus, scale_input, cu_seqlens
        y, last, starts = self._room(x, dt, A, B, C, D, z, dt_bias, state, softplus, scale_input, keep, cu_seqlens)
        problem = self._problem(x, dt, A, B, C, D, z, dt_bias, *options)
        self.engine.forward(*problem, state.contiguous(), y, last, starts if keep else None)
        return y, last, starts

    def _room(self, x, dt, A, B, C, D, z, dt_bias, state, softplus, scale_input, keep, cu_seqlens):
        """Room for what :meth:`_forward` returns."""
        count = chunks(x, cu_seqlens, self.chunk) if keep else 0
        return like(x), like(state), in_huge_pages(state.new_empty(count, A.shape[0] * A.shape[1]))

    def _backward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        starts: Tensor,
        softplus: bool,
        scale_input: bool,
        shared: bool,
        cu_seqlens: Sequence[int] | None,
        dy: Tensor,
        dlast: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of x, dt, A, B, C, D, z, dt_bias and state; those of B and C only where ``shared``."""
        options = softplus, scale_input, cu_seqlens
        gradients = self._room_for_gradients(x, dt, A, B, C, D, z, dt_bias, starts, *options[:2], shared, cu_seqlens,
                                             dy, dlast)  # fmt: skip
        dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = gradients
        problem = self._problem(x, dt, A, B, C, D, z, dt_bias, *options)
        out = dx, ddt, *((dB, dC) if shared else (None, None)), None if z is None else dz
        self.engine.backward(*problem, starts, rows(dy), dlast.contiguous(), *out, dA, dD, dbias, dstate)
        return gradients

    def _room_for_gradients(
        self, x, dt, A, B, C, D, z, dt_bias, starts, softplus, scale_input, shared, cu_seqlens, dy, dlast
    ):
        """Room for what :meth:`_backward` returns; empty where there is nothing."""
        dB, dC = (like(m) if shared else m.new_empty(0) for m in (B, C))
        dz = x.new_empty(0) if z is None else like(z)
        return like(x), like(dt), like(A), dB, dC, A.new_empty(len(A)), dz, A.new_empty(len(A)), like(dlast)

    def _gradients(self, call: Saved, dy: Tensor, dlast: Tensor) -> list[Tensor | None]:
        *inputs, _state, softplus, scale_input, _keep, cu_seqlens = call.inputs
        shared = call.needed[3] or call.needed[4]
        found = self.backward(*inputs, *call.kept, softplus, scale_input, shared, cu_seqlens, dy, dlast)
        return [one if needed else None for one, needed in zip(found, call.needed, strict=False)]


def _plain(x, dt, A, B, C, D, z, dt_bias, state, softplus, scale_input, keep, cu_seqlens):
    """y and the last state, of the arguments of ``_forward``, by torch's own functions."""
    offsets = None if cu_seqlens is None else tuple(cu_seqlens)
    return recurrent_torch.run(x, dt, A, B, C, D, z, dt_bias, softplus, scale_input, state, offsets)
