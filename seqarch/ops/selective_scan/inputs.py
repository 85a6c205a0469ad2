"""The inputs of ``selective_scan``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class SelectiveScanInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.selective_scan`.

    Attributes:
        x: ``[B, T, D]``.
        dt: ``[B, T, D]``.
        A: ``[D, N]``.
        B: ``[B, T, G, N]``; group g serves channels ``g D / G`` on.
        C: ``[B, T, G, N]``.
        D: ``[D]`` or ``None``.
        z: ``[B, T, D]`` or ``None``.
        dt_bias: ``[D]`` or ``None``.
        dt_softplus: whether the step size is ``softplus(dt + dt_bias)``.
        scale_input: whether x is multiplied by the step size as it enters the state.
        state: ``[B, D, N]`` before the first token, a row per sequence where they are packed; in the dtype of sums.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    scale_input: bool
    state: Tensor
    offsets: tuple[int, ...] | None
