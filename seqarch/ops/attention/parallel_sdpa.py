"""torch's ``scaled_dot_product_attention`` on all queries at once, with a mask only where it needs one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.common.checks import promoted_dtype
from seqarch.ops.common.packed import each_sequence


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, causal, window, scale, key_start)

    return each_sequence(one, offsets, q, k, v)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float, key_start: Tensor | None
) -> Tensor:
    unseen = 0 if window is None else max(0, k.shape[1] - q.shape[1] - window + 1)
    if unseen:  # keys that have left even the first query's window
        k, v = k[:, unseen:], v[:, unseen:]
        key_start = None if key_start is None else key_start - unseen
    if window is not None and window >= k.shape[1]:
        window = None
    if q.shape[1] == 1:  # the last query sees all that is left
        causal, window = False, None
    # torch aligns is_causal with the first key, this operation with the last
    plain = window is None and key_start is None and (not causal or q.shape[1] == k.shape[1])
    mask = None if plain else visible(q.shape[1], k.shape[1], causal, window, key_start, q.device)
    return sdpa(q, k, v, scale, mask, is_causal=causal and plain)


def visible(
    queries: int, keys: int, causal: bool, window: int | None, key_start: Tensor | None, device: torch.device
) -> Tensor:
    """Which key each query sees: booleans ``[1, 1, Tq, Tk]``, or ``[B, 1, Tq, Tk]`` with ``key_start``."""
    key = torch.arange(keys, device=device)
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    mask = key <= query if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    if window is not None:
        mask = mask & (key > query - window)
    if key_start is None:
        return mask[None, None]
    return mask & (key >= key_start[:, None, None, None])


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """``scaled_dot_product_attention`` in this project's layout, dtypes and shared heads."""
    common = promoted_dtype(q, k, v)
    heads_first = (tensor.to(common).transpose(1, 2) for tensor in (q, k, v))
    shared = q.shape[2] != k.shape[2]
    o = F.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=shared
    )
    return o.transpose(1, 2).to(v.dtype)
