"""The inputs of ``linear_attention``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class LinearAttentionInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.linear_attention`.

    Attributes:
        q: ``[B, T, G, K]``; head h of v uses head ``h // (H / G)``.
        k: ``[B, T, G, K]``.
        v: ``[B, T, H, V]``.
        log_decay: ``[H]``, ``[B, T, H]``, ``[B, T, H, K]`` or ``None``.
        scale: of the outputs.
        state: ``[B, H, K, V]`` before the first token, a row per sequence where they are packed; in the dtype of sums.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    scale: float
    state: Tensor
    offsets: tuple[int, ...] | None
