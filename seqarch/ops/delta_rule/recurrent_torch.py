"""The reference: one step after the other, as the equation is written."""

from __future__ import annotations

from torch import Tensor

from seqarch.ops.chunked.recurrence import recur

TRANSFORMABLE = True


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    read: Tensor,
    erase: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    def overwrite(state: Tensor, k: Tensor, v: Tensor, beta: Tensor, read: Tensor) -> Tensor:
        return state + k.mT @ (beta * (v - read @ state))

    def write_apart(state: Tensor, k: Tensor, v: Tensor, beta: Tensor, read: Tensor, erase: Tensor) -> Tensor:
        return state + k.mT @ (beta * v) - erase.mT @ (beta * (read @ state))

    inputs = (k, v, beta.unsqueeze(-1), read)
    if erase is None:
        o, state = recur(overwrite, q, inputs, log_decay, scale, state, offsets)
    else:
        o, state = recur(write_apart, q, (*inputs, erase), log_decay, scale, state, offsets)
    return o.to(v.dtype), state
