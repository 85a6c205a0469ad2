"""Compiled kernels of the causal convolution as custom operators: what the C++ and the CUDA backend share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.causal_conv1d import parallel_torch
from seqarch.ops.chunked.packing import sequence_count
from seqarch.ops.native.custom_op import Engine, Formula, Saved, define
from seqarch.ops.native.huge_pages import like


def refuse_dtypes(x: Tensor, weight: Tensor, numbers: dict[torch.dtype, int]) -> str | None:
    """Why kernels that know these dtypes cannot serve x and parameters of weight's dtype."""
    if x.dtype not in numbers:
        return f"x has dtype {x.dtype}, expected one of {', '.join(map(str, numbers))}"
    if weight.dtype != torch.float32 and x.dtype != weight.dtype:
        return f"x has dtype {x.dtype} beside {weight.dtype} parameters, expected the same"
    return None


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels lie side by side, else a copy in which they do."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


class Operators:
    """The forward and the backward operator of an engine, with their fakes and the autograd formula.

    Args:
        name: of the forward operator, after ``seqarch::``.
        device: the type of device that it runs on; ``None``: any.
    """

    def __init__(self, name: str, engine: Engine, device: str | None):
        self.engine = engine
        self.forward, self.backward = define(
            name, self._forward, self._backward, self._room, self._room_for_gradients,
            Formula(self._gradients, parallel_torch.run, results=2), device,
        )  # fmt: skip

    def _inputs(self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> tuple[Any, ...]:
        x, weight = _rows(x), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        state = None if state is None else state.contiguous()
        return self.engine.numbers[x.dtype], x, x.stride(0), x.stride(1), weight, bias, state

    def _problem(self, x: Tensor, weight: Tensor, silu: bool, cu_seqlens: Sequence[int] | None) -> tuple[Any, ...]:
        offsets = self.engine.offsets(cu_seqlens, x.device)
        return offsets, sequence_count(x, cu_seqlens), x.shape[1], x.shape[2], weight.shape[1], silu

    def _forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        silu: bool,
        cu_seqlens: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor]:
        outputs = self._room(x, weight, bias, state, silu, cu_seqlens)
        self.engine.forward(
            *self._inputs(x, weight, bias, state), *outputs, *self._problem(x, weight, silu, cu_seqlens)
        )
        return outputs

    def _room(self, x, weight, bias, state, silu, cu_seqlens):
        """Room for a tensor like ``x`` and for a state."""
        last = x.new_empty(sequence_count(x, cu_seqlens), weight.shape[1] - 1, x.shape[2])
        return like(x), last

    def _backward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        silu: bool,
        cu_seqlens: Sequence[int] | None,
        dy: Tensor,
        dstate_out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of x, weight, bias and state; of the last two also where there is no bias or state."""
        gradients = self._room_for_gradients(x, weight, bias, state, silu, cu_seqlens, dy, dstate_out)
        dy = _rows(dy)
        upstream = dy, dy.stride(0), dy.stride(1), dstate_out.contiguous()
        inputs = self._inputs(x, weight, bias, state)
        self.engine.backward(*inputs, *upstream, *gradients, *self._problem(x, weight, silu, cu_seqlens))
        return gradients

    def _room_for_gradients(self, x, weight, bias, state, silu, cu_seqlens, dy, dstate_out):
        dx, dstate = self._room(x, weight, bias, state, silu, cu_seqlens)
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        return dx, dweight, weight.new_empty(weight.shape[0]), dstate

    def _gradients(self, call: Saved, dy: Tensor, dstate_out: Tensor) -> list[Tensor | None]:
        found = self.backward(*call.inputs, dy, dstate_out)
        return [None if given is None else one for given, one in zip(call.inputs, found, strict=False)]
