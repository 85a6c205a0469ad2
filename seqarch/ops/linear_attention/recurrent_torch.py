"""The reference: one step after the other, as the equation is written."""

from __future__ import annotations

from torch import Tensor

from seqarch.ops.chunked.recurrence import recur

TRANSFORMABLE = True


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    def write(state: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return state + k.mT @ v

    o, state = recur(write, q, (k, v), log_decay, scale, state, offsets)
    return o.to(v.dtype), state
