"""Shared by the matrix-state recurrences (linear attention, the delta rule): checks, operators, and the references'
loop over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import sequences
from seqarch.ops.dispatch import checks
from seqarch.ops.dispatch.inputs import Inputs, RecurrenceInputs
from seqarch.ops.native.custom_op import Operator, Upstream
from seqarch.ops.native.huge_pages import like

Pair = tuple[Tensor, Tensor]
R = TypeVar("R", bound=Inputs)
DECAY_PATTERNS = {1: "H", 3: "B T H", 4: "B T H K"}


def prepare_recurrence(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    state: Tensor | None,
    cu_seqlens: Tensor | Sequence[int] | None,
    beta: Tensor | None = None,
    **keys: Tensor | None,
) -> tuple[float, Tensor, tuple[int, ...] | None]:
    """Check the arguments that these operations share; the scale, the state ``[B, H, K, V]`` and the offsets.

    Args:
        keys: further tensors of the shape of ``k``, by name.

    Raises:
        ValueError: shapes disagree, heads do not divide, or the offsets are wrong.
        TypeError: an input is not floating point.
    """
    checks.floating_on_one_device(op, q=q, k=k, v=v, log_decay=log_decay, beta=beta, state=state, **keys)
    if log_decay is not None and log_decay.ndim not in DECAY_PATTERNS:
        shapes = "[H], [B, T, H] or [B, T, H, K]"
        raise ValueError(f"{op}: log_decay has shape {list(log_decay.shape)}, expected {shapes}")
    pattern = "" if log_decay is None else DECAY_PATTERNS[log_decay.ndim]
    sizes = checks.match_shapes(
        op,
        q=(q, "B T G K"),
        k=(k, "B T G K"),
        v=(v, "B T H V"),
        beta=(beta, "B T H"),
        log_decay=(log_decay, pattern),
        **{name: (key, "B T G K") for name, key in keys.items()},
    )
    checks.divides(op, sizes["G"], "the heads of q and k", sizes["H"], "the heads of v")
    offsets = checks.sequence_offsets(op, cu_seqlens, sizes["B"], sizes["T"])
    rows = sizes["B"] if offsets is None else len(offsets) - 1
    shape = (rows, sizes["H"], sizes["K"], sizes["V"])
    dtype = checks.accumulation_dtype(q, k, v, beta, log_decay, state, *keys.values())
    state = checks.initial_state(op, state, shape, dtype, v.device)
    return checks.finite_scale(op, scale, sizes["K"]), state, offsets


def recurrence_operator(
    name: str,
    kind: type[R],
    forward: Callable[[R], Pair],
    backward: Callable[[R, Upstream], Sequence[Tensor]],
    plain: Callable[[R], Pair],
    devices: str | Sequence[str],
) -> Operator[R]:
    """The operator of o and the last state, of which nothing is kept but inputs; as :class:`Operator`."""
    return Operator(name, kind, forward, backward, plain, _outputs, results=2, devices=devices)


def _outputs(inputs: Any) -> Pair:
    return like(inputs.v), like(inputs.state)


def stepwise(log_decay: Tensor | None, v: Tensor) -> Tensor | None:
    """``[H]`` as a view ``[B, T, H]``; other decays as they are."""
    return log_decay.expand(v.shape[:3]) if log_decay is not None and log_decay.ndim == 1 else log_decay


def token_inputs(inputs: RecurrenceInputs, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """For each sequence its state ``[1 or B, H, K, V]``, its decays and its part of the tensors ``[B, T, G, ...]``.

    All in the state's dtype, with a row per head of v, ``[B, T, H, 1, ...]``; decays ``[B, T, H, 1 or K, 1]`` are
    factors, ``None`` where there are none.
    """
    state, log_decay = inputs.state, inputs.log_decay
    if log_decay is not None:
        log_decay = log_decay.to(state.dtype)
        if log_decay.ndim == 1:
            log_decay = log_decay.expand(1, inputs.q.shape[1], -1)
        log_decay = log_decay[..., None, None] if log_decay.ndim == 3 else log_decay.unsqueeze(-1)
    per_head = [
        x.to(state.dtype).repeat_interleave(state.shape[1] // max(1, x.shape[2]), dim=2).unsqueeze(-2) for x in tensors
    ]
    decay = None if log_decay is None else log_decay.exp()
    return sequences(inputs.offsets, state, decay, *per_head)


def join_tokens(outputs: list[Tensor], inputs: RecurrenceInputs, *tensors: Tensor) -> Tensor:
    """Each token's output ``[B, H, 1, V]``, joined to ``[B, T, H, V]``; of no token, an empty sum over the tensors."""
    if outputs:
        return torch.stack(outputs, dim=1).squeeze(-2)
    return inputs.state.new_empty(inputs.v.shape) + 0 * sum(x.sum() for x in tensors)
