"""What the matrix-state recurrences (linear attention, the delta rule) check alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqarch.ops.common import checks

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
) -> tuple[float, Tensor, tuple[int, ...] | None]:
    """Check the arguments that these operations share; the scale, the state ``[B, H, K, V]`` and the offsets.

    Raises:
        ValueError: shapes disagree, heads do not divide, or the offsets are wrong.
        TypeError: an input is not floating point.
    """
    checks.floating_on_one_device(op, q=q, k=k, v=v, log_decay=log_decay, beta=beta, state=state)
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
    )
    checks.divides(op, sizes["G"], "the heads of q and k", sizes["H"], "the heads of v")
    offsets = checks.sequence_offsets(op, cu_seqlens, sizes["B"], sizes["T"])
    rows = sizes["B"] if offsets is None else len(offsets) - 1
    shape = (rows, sizes["H"], sizes["K"], sizes["V"])
    state = checks.initial_state(op, state, shape, checks.accumulation_dtype(q, k, v, beta, log_decay, state), v.device)
    return sizes["K"] ** -0.5 if scale is None else scale, state, offsets
