"""What the matrix-state recurrences (linear attention, the delta rule) do alike: checks, operators, and the reference's
loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import over_sequences
from seqarch.ops.dispatch import checks
from seqarch.ops.native.custom_op import Formula, Saved, define
from seqarch.ops.native.huge_pages import like

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


def room_for_gradients(*inputs: Tensor | None) -> Any:
    """A tuple of room for the gradient of each; an empty tensor for ``None``."""
    return tuple(torch.empty(0) if each is None else like(each) for each in inputs)


def as_given(inputs: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> Any:
    """A tuple of gradients in the dtypes and shapes of what they are of; an empty tensor for ``None``."""
    return tuple(
        torch.empty(0) if each is None or one is None else one.to(each.dtype).view(each.shape)
        for each, one in zip(inputs, found, strict=True)
    )


def differentiable(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    plain: Callable[..., tuple[Tensor, Tensor]],
    devices: str | Sequence[str],
) -> Callable[..., Any]:
    """The operator ``seqarch::NAME`` for these types of device, of which nothing is kept but inputs.

    ``forward(q, k, v, ..., scale, state, cu_seqlens)`` gives o and the last state. ``backward`` takes the same and the
    gradients of both, and gives those of the tensors before ``scale``, empty where there is none, and of ``state``.
    ``plain`` is ``forward`` by torch's own functions.
    """

    def outputs(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return like(v), like(others[-2])

    def gradients(*inputs: Any) -> tuple[Tensor, ...]:
        *tensors, _, state, _, _, _ = inputs
        return room_for_gradients(*tensors, state)

    def differentiate(call: Saved, do: Tensor, dstate_out: Tensor) -> list[Tensor | None]:
        *found, dstate = gradient(*call.inputs, do, dstate_out)
        return [None if each is None else one for each, one in zip(call.inputs, found, strict=False)] + [None, dstate]

    formula = Formula(differentiate, plain, results=2)
    operator, gradient = define(name, forward, backward, outputs, gradients, formula, devices)
    return operator


def recur(
    write: Callable[..., Tensor],
    q: Tensor,
    inputs: Sequence[Tensor],
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    offsets: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """One step after the other: decay the state, ``write`` into it, read it with q.

    Args:
        write: takes the state ``[B, H, K, V]`` and each input's ``[B, H, 1, ...]`` at one token; the state after it.
        inputs: ``[B, T, G, ...]`` each; head h uses row ``h // (H / G)``.

    Returns:
        outputs ``[B, T, H, V]`` in the state's dtype and the last state.
    """
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(1, q.shape[1], -1)
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)

    def each_head(x: Tensor) -> Tensor:
        return x.to(state.dtype).repeat_interleave(state.shape[1] // max(1, x.shape[2]), dim=2).unsqueeze(-2)

    def one(state: Tensor, log_decay: Tensor | None, q: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(q.shape[1]):
            if log_decay is not None:
                state = state * log_decay[:, t, ..., None].exp()
            state = write(state, *(x[:, t] for x in inputs))
            outputs.append((q[:, t] @ state).squeeze(-2))
        empty = state.new_empty(*q.shape[:3], state.shape[-1]) if not outputs else None
        return torch.stack(outputs, dim=1) if empty is None else empty + 0 * sum(x.sum() for x in (q, *inputs)), state

    log_decay = None if log_decay is None else log_decay.to(state.dtype)
    return over_sequences(one, offsets, state, log_decay, each_head(q) * scale, *(each_head(x) for x in inputs))
