"""The inputs of ``path_attention``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class PathAttentionInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.path_attention`.

    Attributes:
        q: ``[B, Tq, H, K]``.
        k: ``[B, Tk, G, K]``; query head h uses head ``h // (H / G)``.
        v: ``[B, Tk, G, V]``.
        w: ``[B, Tq, G, K]``.
        beta: ``[B, Tq, G]``.
        key_bias: ``[B, Tk, H]``, or ``None``.
        scale: of the scores.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
        key_start: ``[B]``, the first key of each row that is not padding, or ``None``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    key_bias: Tensor | None
    scale: float
    offsets: tuple[int, ...] | None
    key_start: Tensor | None
