"""The inputs of ``experts``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from seqarch.ops.dispatch.inputs import Inputs
from seqarch.ops.experts.activations import ACTIVATIONS, gated_unit

Matrices = Mapping[str, Tensor]
"""Of one expert: ``w_in`` and, of a gated one, ``w_gate``, ``[D, F]``, and ``w_out [F, D]``."""


@dataclass(frozen=True)
class ExpertsInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.experts`, in any floating dtypes.

    Backends check the range of ``expert_index``, for whose numbers they wait anyway.

    Attributes:
        x: ``[B, T, D]`` or ``[N, D]``.
        w_in: ``[E, D, F]``.
        w_out: ``[E, F, D]``.
        expert_index: ``[B, T, k]`` or ``[N, k]``, int64; -1 for no expert.
        expert_weight: of the same shape.
        w_gate: ``[E, D, F]``; ``None`` where experts are plain MLPs.
        activation: a key of ``ACTIVATIONS``.
        b_in, b_gate: ``[E, F]``, added to the products with ``w_in`` and ``w_gate``, or ``None``.
        b_out: ``[E, D]``, added to that with ``w_out``, or ``None``.
        limit: of gates from above and of values either way; 0 for none.
        value_offset: added to values, within their limits, before they are gated.
    """

    x: Tensor
    w_in: Tensor
    w_out: Tensor
    expert_index: Tensor
    expert_weight: Tensor
    w_gate: Tensor | None
    activation: str
    b_in: Tensor | None = None
    b_out: Tensor | None = None
    b_gate: Tensor | None = None
    limit: float = 0.0
    value_offset: float = 0.0

    def hidden(self, value: Tensor, gate: Tensor | None) -> Tensor:
        """What ``w_out`` takes: ``act(value)``, or the unit of both."""
        if gate is None:
            return ACTIVATIONS[self.activation](value)
        return gated_unit(self.activation, gate, value, self.limit, self.value_offset)

    def flat(self) -> Self:
        """The same on tokens one after the other: ``x [N, D]``, ``expert_index`` and ``expert_weight [N, k]``."""
        x, index, weight = (each.flatten(0, -2) for each in (self.x, self.expert_index, self.expert_weight))
        return self.replace(x=x, expert_index=index, expert_weight=weight)
