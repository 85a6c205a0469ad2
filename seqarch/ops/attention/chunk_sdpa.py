"""Windows in blocks: each block of queries attends to its own block and the blocks that its window reaches back to.

The cost is ``O(T (w + C))`` for blocks of C tokens, forward and backward, and no tensor is longer than that. A call
that fits into one block with its window is one block: the very call that ``parallel_sdpa`` makes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.attention import parallel_sdpa

BLOCK = 128  # fastest of 64, 128 and 256 on a CPU at T = 4096 with a window of 128


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> str | None:
    return "there is no window, so every query sees all keys before it" if window is None else None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> Tensor:
    batch, queries = q.shape[:2]
    count = -(-queries // BLOCK)
    seen = 1 + -(-(window - 1) // BLOCK)  # blocks of keys for a block of queries, its own included
    if seen * BLOCK >= _reach(queries, k.shape[1], window, offsets):
        return parallel_sdpa.run(q, k, v, causal, window, scale, offsets, key_start)
    shift = k.shape[1] - queries  # the position of the first query
    after = count * BLOCK - queries
    before = (seen - 1) * BLOCK - shift  # negative where the first keys are out of reach of every query

    def key_blocks(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, before, after)).unflatten(1, (count + seen - 1, BLOCK))
        return torch.cat([x[:, i : i + count] for i in range(seen)], dim=2).flatten(0, 1)

    blocks = F.pad(q, (0, 0, 0, 0, 0, after)).reshape(batch * count, BLOCK, *q.shape[2:])
    earliest = F.pad(_earliest(queries, shift, window, offsets, key_start, q.device), (0, after))
    mask = _visible(earliest.unflatten(1, (count, BLOCK)), shift, seen)
    mask = mask.expand(batch, -1, -1, -1).reshape(batch * count, 1, BLOCK, seen * BLOCK)
    o = parallel_sdpa.sdpa(blocks, key_blocks(k), key_blocks(v), scale, mask)
    return o.reshape(batch, count * BLOCK, q.shape[2], v.shape[3])[:, :queries]


def _reach(queries: int, keys: int, window: int, offsets: tuple[int, ...] | None) -> int:
    """How many keys the queries of one sequence see together, at most."""
    if offsets is None:
        return min(keys, queries + window - 1)
    return max(end - start for start, end in pairwise(offsets))


def _earliest(
    queries: int,
    shift: int,
    window: int,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
    device: torch.device,
) -> Tensor:
    """The first position that each query may see: ``[1, Tq]``, or ``[B, Tq]`` with ``key_start``."""
    earliest = torch.arange(shift - window + 1, shift - window + 1 + queries, device=device).clamp(min=0)[None]
    if key_start is not None:
        return torch.maximum(earliest, key_start[:, None])
    if offsets is not None:
        bounds = torch.tensor(offsets, device=device)
        return torch.maximum(earliest, bounds[:-1].repeat_interleave(bounds.diff(), output_size=queries))
    return earliest


def _visible(earliest: Tensor, shift: int, seen: int) -> Tensor:
    """Booleans ``[B, blocks, BLOCK, seen * BLOCK]`` from the first visible position ``[B, blocks, BLOCK]``."""
    block = torch.arange(earliest.shape[1], device=earliest.device)[:, None] * BLOCK + shift
    query = block + torch.arange(BLOCK, device=earliest.device)
    key = block + torch.arange((1 - seen) * BLOCK, BLOCK, device=earliest.device)
    return (key[:, None] <= query[..., None]) & (key[:, None] >= earliest[..., None])
