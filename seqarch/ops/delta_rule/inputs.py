"""The inputs of ``delta_rule``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class DeltaRuleInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.delta_rule`, in any floating dtype unless said otherwise.

    Attributes:
        q: ``[B, T, G, K]``; head h of v uses head ``h // (H / G)``.
        k: ``[B, T, G, K]``.
        v: ``[B, T, H, V]``.
        beta: ``[B, T, H]``.
        log_decay: ``[H]``, ``[B, T, H]``, ``[B, T, H, K]`` or ``None``.
        read: ``[B, T, G, K]``, what reads the old value; ``None`` where it is k.
        erase: ``[B, T, G, K]``, where the old value is removed; ``None`` where it is k.
        scale: of the outputs.
        state: ``[B, H, K, V]`` before the first token, a row per sequence where they are packed; in the dtype of sums.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    read: Tensor | None
    erase: Tensor | None
    scale: float
    state: Tensor
    offsets: tuple[int, ...] | None
