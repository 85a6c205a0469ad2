"""The inputs of ``causal_conv1d``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class CausalConv1dInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.causal_conv1d`.

    Attributes:
        x: ``[B, T, D]``.
        weight: ``[D, W]``, in the dtype of sums.
        bias: ``[D]``, in the dtype of sums, or ``None``.
        state: ``[B, W - 1, D]``, a row per sequence where they are packed, in the dtype of x; ``None``: zeros.
        silu: whether SiLU follows.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor | None
    silu: bool
    offsets: tuple[int, ...] | None

    @property
    def sequences(self) -> int:
        """How many sequences x holds: rows of the state."""
        return self.x.shape[0] if self.offsets is None else len(self.offsets) - 1

    def initial_state(self) -> Tensor:
        """The state, or zeros."""
        if self.state is not None:
            return self.state
        return self.x.new_zeros(self.sequences, self.weight.shape[1] - 1, self.x.shape[2])
