"""The largest score within each query's window, which attention does not return."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import accumulation_dtype

BLOCK = 64
"""Queries whose scores are one product."""


def largest_scores(q: Tensor, k: Tensor, positions: Tensor, window: int, scale: float | None = None) -> Tensor:
    """``max_j scale q_t . k_j`` over the last ``window`` keys of each query's own sequence, its own included.

    In blocks of queries, each against the keys of all its windows: ``O(T (w + 64) K)`` per head. The scores are held
    for the search alone; the gradient is that of the one that is the largest, the first of several.

    Args:
        q, k: ``[B, Tq, H, K]`` and ``[B, Tk, G, K]``; the last query is at the last key, and Tk is at least Tq.
        positions: of the queries in their own sequences, ``[1, Tq]`` or ``[B, Tq]``.
        scale: defaults to ``K ** -0.5``.

    Returns:
        ``[B, Tq, H]``, float32 or float64.
    """
    wide = accumulation_dtype(q, k)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, window = q.to(wide) * factor, k.to(wide), max(1, min(window, k.shape[1]))
    with_gradient = torch.is_grad_enabled()
    with torch.no_grad(), without_autocast(q.device):
        scores, before = _in_blocks(q, k, positions, window)
        if not with_gradient:
            return _of_queries(scores.amax(-1), q)
        size = scores.shape[-2]
        block = torch.arange(scores.shape[1], device=q.device).view(-1, 1, 1, 1) * size
        index = _of_queries(scores.argmax(-1) + block, q) - before  # [B, Tq, H], in k
    index = index.unflatten(2, (k.shape[2], -1)).transpose(2, 3)  # [B, Tq, H / G, G]
    best = k.gather(1, index.flatten(1, 2).unsqueeze(-1).expand(-1, -1, -1, k.shape[3]))
    best = best.unflatten(1, index.shape[1:3]).transpose(2, 3).flatten(2, 3)
    return (q * best).sum(-1)


def _in_blocks(q: Tensor, k: Tensor, positions: Tensor, window: int) -> tuple[Tensor, int]:
    """The scores ``[B, N, G, H / G, size, size + w - 1]`` of N blocks of queries, -inf of what a query does not see,
    and how many keys before the first of k the first block begins."""
    queries, groups = q.shape[1], k.shape[2]
    size, count = _blocks(queries)
    after, before = count * size - queries, window - 1 - (k.shape[1] - queries)
    steps = torch.arange(size + window - 1, device=q.device)
    places = torch.arange(count, device=q.device)[:, None] * size + steps
    if queries == 1:  # a captured token takes a slice at any length, padding at one alone
        keys = k[:, k.shape[1] - window :].unsqueeze(1)
    else:
        keys = F.pad(k, (0, 0, 0, 0, before, after)).index_select(1, places.flatten()).unflatten(1, places.shape)
    blocks = F.pad(q, (0, 0, 0, 0, 0, after)).unflatten(1, (count, size)).unflatten(3, (groups, -1))
    scores = torch.einsum("bnsgrk,bnjgk->bngrsj", blocks, keys)
    # how far back a key is, and how far a query sees
    distance = steps[:size, None] + (window - 1) - steps
    reach = F.pad(positions.clamp(max=window - 1), (0, after)).unflatten(1, (count, size)).unsqueeze(-1)
    visible = (distance >= 0) & (distance <= reach)
    return scores.masked_fill(~visible[:, :, None, None], -torch.inf), before


def _of_queries(x: Tensor, q: Tensor) -> Tensor:
    """``[B, N, G, H / G, size]`` as ``[B, Tq, H]``."""
    return x.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)[:, : q.shape[1]]


def _blocks(queries: int) -> tuple[int, int]:
    """Queries of a block, and blocks."""
    size = 1 if queries == 1 else BLOCK
    return size, max(1, -(-queries // size))


def flops(queries: int, keys: int, heads: int, width: int, window: int, batch_size: int = 1) -> int:
    """FLOPs of :func:`largest_scores`: those of the products, of whole blocks."""
    size, count = _blocks(queries)
    return 2 * batch_size * heads * width * count * size * (size + min(window, keys) - 1)
