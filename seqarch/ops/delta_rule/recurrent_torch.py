"""The reference: one step after the other, as the equation is written."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.common.decay import per_step_decay
from seqarch.ops.common.packed import over_sequences


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    repeats = v.shape[2] // q.shape[2]
    wide = state.dtype
    q = q.to(wide).repeat_interleave(repeats, dim=2) * scale
    k = k.to(wide).repeat_interleave(repeats, dim=2)
    log_decay = None if log_decay is None else log_decay.to(wide)
    per_head = None if log_decay is None or log_decay.ndim > 1 else log_decay
    per_step = None if log_decay is None or log_decay.ndim == 1 else log_decay

    def one(
        state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, per_step: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        outputs = []
        decay = per_head if per_step is None else per_step
        for t in range(q.shape[1]):
            if decay is not None:
                state = state * per_step_decay(decay, t)
            recalled = k[:, t, :, None, :] @ state
            correction = beta[:, t, :, None, None] * (v[:, t, :, None, :] - recalled)
            state = state + k[:, t, :, :, None] @ correction
            outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
        return torch.stack(outputs, dim=1) if outputs else v, state

    o, state = over_sequences(one, offsets, state, q, k, v.to(wide), beta.to(wide), per_step)
    return o.to(v.dtype), state
