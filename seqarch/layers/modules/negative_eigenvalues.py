"""Decays in (-1, 1): a recurrence with negative decays as one with positive decays and signs beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqarch import ops
from seqarch.layers.mixer import Boundaries

Attend = Callable[..., tuple[Tensor, Tensor]]
"""What ``ops.linear_attention`` is: q, k, v and options by name to outputs and states."""


def signed_decay(decay: Tensor, cu_seqlens: Boundaries = None) -> tuple[Tensor, Tensor, Tensor]:
    """Split decays in (-1, 1) into magnitudes and the running product of their signs.

    With ``c_t`` that product, ``S_t = a_t S_{t-1} + k_t^T v_t`` is ``c_t`` times the recurrence that decays by
    ``|a_t|`` and writes ``c_t k_t``: give that recurrence ``c_t k_t`` and ``c_t q_t``, and multiply its last state by
    the last ``c_t`` of each row. Negative decays let a model track state (Grazzi et al. 2024, "Unlocking
    State-Tracking in Linear RNNs Through Negative Eigenvalues").

    Args:
        decay: ``[B, T, ...]``, in (-1, 1).
        cu_seqlens: boundaries of the sequences packed into ``B = 1``: each starts again with a product of 1.

    Returns:
        ``log|decay|`` and the products c, both like ``decay``, and the last c of each row, ``[B, ...]`` (one row per
        sequence under ``cu_seqlens``; 1 for a sequence without tokens).
    """
    signs = torch.where(decay < 0, -1.0, 1.0).to(decay.dtype)
    log_decay = decay.abs().clamp(min=torch.finfo(decay.dtype).tiny).log()
    # the product before each token, with that before the first
    one = signs.new_ones(signs.shape[0], 1, *signs.shape[2:])
    before = torch.cat([one, signs.cumprod(1)], dim=1)
    if cu_seqlens is None:
        return log_decay, before[:, 1:], before[:, -1]
    boundaries = torch.as_tensor(cu_seqlens, device=decay.device)
    starts = before[0, boundaries[:-1]]
    own = starts.repeat_interleave(boundaries.diff(), dim=0, output_size=decay.shape[1])
    return log_decay, before[:, 1:] * own, before[0, boundaries[1:]] * starts


def signed_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Boundaries = None,
    attend: Attend = ops.linear_attention,
) -> tuple[Tensor, Tensor]:
    """:func:`ops.linear_attention` with each decay ``a`` in (0, 1) moved to ``2 a - 1`` in (-1, 1).

    ``log_decay``, the logarithm of a, is ``[B, T, H]`` or ``[B, T, H, K]``; the rest as there. ``attend`` may be
    another operation that is linear in the values, whose states ``[B, H, ..., K, V]`` all decay by the same numbers.
    """
    # in float64: decays near 1 lose what makes them differ from it
    wide, signs, last = signed_decay(2 * log_decay.double().exp() - 1, cu_seqlens)
    log_decay, signs, last = wide.to(log_decay.dtype), signs.to(v.dtype), last.to(log_decay.dtype)
    if log_decay.ndim == 4:
        q, k = signs * q, signs * k
        o, state = attend(q, k, v, log_decay=log_decay, scale=scale, state=state, cu_seqlens=cu_seqlens)
        return o, last.unsqueeze(-1) * state
    # one sign per head goes to the values as well, so that heads may still share q and k
    signs = signs.unsqueeze(-1)
    o, state = attend(q, k, signs * v, log_decay=log_decay, scale=scale, state=state, cu_seqlens=cu_seqlens)
    return signs * o, last.view(*last.shape, *[1] * (state.ndim - 2)) * state
