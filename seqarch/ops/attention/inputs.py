"""The inputs of ``attention``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class AttentionInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.attention`.

    Attributes:
        q: ``[B, Tq, H, K]``.
        k: ``[B, Tk, G, K]``; query head h uses head ``h // (H / G)``.
        v: ``[B, Tk, G, V]``.
        causal: the last query is at the last key, and none sees a later key than its own.
        window: how many keys a query sees at most, its own included, no more than there are; 0 for no window.
        scale: of the scores.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
        key_start: ``[B]``, the first key of each row that is not padding, or ``None``.
        logit_cap: c in ``c tanh(score / c)``; 0 for none.
        return_lse: whether the result is ``(o, lse)``.
        key_bias: ``[B, Tk, H]``, added to the scores of each key, in the dtype of sums; or ``None``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    window: int
    scale: float
    offsets: tuple[int, ...] | None
    key_start: Tensor | None
    logit_cap: float = 0.0
    return_lse: bool = False
    key_bias: Tensor | None = None

    def blind(self) -> Tensor | None:
        """Which queries see no key, ``[B or 1, Tq]``; ``None`` where each sees one."""
        queries, keys = self.q.shape[1], self.k.shape[1]
        if self.offsets is not None or (self.key_start is None and keys and (not self.causal or queries <= keys)):
            return None
        last = torch.arange(keys - queries, keys, device=self.device)
        last = last if self.causal else torch.full_like(last, keys - 1)
        return last < (0 if self.key_start is None else self.key_start[:, None].clamp(min=0))
