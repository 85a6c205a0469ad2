"""The inputs of ``log_linear_attention``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class LogLinearAttentionInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.log_linear_attention`.

    Attributes:
        q: ``[B, T, G, K]``; head h of v uses head ``h // (H / G)``.
        k: ``[B, T, G, K]``.
        v: ``[B, T, H, V]``.
        level_weight: ``[B, T, H, L]``.
        beta: ``[B, T, H]``; ``None`` for linear attention.
        log_decay: ``[B, T, H]`` or ``None``.
        scale: of the outputs.
        state: ``[B, H, L - 1, K, V]`` before the first token, a row per sequence where they are packed; in the dtype of
            sums.
        before: the tokens before each row of the state.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    level_weight: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    scale: float
    state: Tensor
    before: tuple[int, ...]
    offsets: tuple[int, ...] | None
