"""The inputs of ``gated_rnn``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class GatedRnnInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.gated_rnn`.

    Attributes:
        x: ``[B, T, H, gates, W]``.
        weight: ``[H, gates, W, W]``, in the dtype of sums.
        bias: ``[H, gates, W]``, likewise.
        state: ``[B, states, H, W]`` before the first token, a row per sequence where they are packed; likewise.
        cell: ``"slstm"``, ``"lstm"`` or ``"gru"``.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    state: Tensor
    cell: str
    offsets: tuple[int, ...] | None
