"""Routed experts whose weights are not all in memory, without gradients: each is asked for where it is computed.

The products, and their order, are those of :mod:`seqarch.ops.experts.chunk_torch`, so that results are the same to the
bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.experts.chunk_torch import ChunkInputs, forward
from seqarch.ops.experts.groups import product_dtype
from seqarch.ops.experts.inputs import Matrices


class Store(Protocol):
    """A layer's experts.

    Attributes:
        form: ``w_in``, ``w_out`` and, of gated ones, ``w_gate`` of all experts, on the meta device.
    """

    form: dict[str, Tensor]

    def matrices(self, experts: Sequence[int]) -> Iterator[tuple[int, Matrices]]:
        """Each of these experts with its matrices, in any order; sure until the next is asked for."""
        ...


_STORES: WeakValueDictionary[int, Store] = WeakValueDictionary()
_NUMBERS = count()


def register(store: Store) -> int:
    """The number by which :func:`offloaded_experts` knows a store, as long as it is there."""
    number = next(_NUMBERS)
    _STORES[number] = store
    return number


torch.library.define(
    "seqarch::offloaded_experts",
    "(Tensor x, Tensor index, Tensor weight, int store, Tensor? b_in, Tensor? b_out, Tensor? b_gate, str activation,"
    " float limit, float value_offset) -> Tensor",
)
offloaded_experts = torch.ops.seqarch.offloaded_experts.default


@torch.library.impl("seqarch::offloaded_experts", "CPU")
def _(
    x: Tensor, index: Tensor, weight: Tensor, store: int, b_in: Tensor | None, b_out: Tensor | None,
    b_gate: Tensor | None, activation: str, limit: float, value_offset: float,
) -> Tensor:  # fmt: skip
    """As :func:`seqarch.ops.experts` of ``x [N, D]``, with the experts of a store."""
    kept, dtype = _STORES[store], product_dtype(x)
    biases = {"b_in": b_in, "b_out": b_out, "b_gate": b_gate}
    inputs = ChunkInputs(
        x=x.to(dtype),
        expert_index=index,
        expert_weight=weight.to(accumulation_dtype(x, weight)),
        w_in=kept.form["w_in"],
        w_out=kept.form["w_out"],
        w_gate=kept.form.get("w_gate"),
        **{name: None if bias is None else bias.to(dtype) for name, bias in biases.items()},
        activation=activation,
        limit=limit,
        value_offset=value_offset,
        keep=False,
    )
    y, _ = forward(inputs, kept.matrices)
    return y.to(x.dtype)


@torch.library.register_fake("seqarch::offloaded_experts")
def _(x, index, weight, store, b_in, b_out, b_gate, activation, limit, value_offset):
    return torch.empty_like(x)
