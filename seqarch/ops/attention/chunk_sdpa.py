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
from seqarch.ops.attention.inputs import AttentionInputs

TRANSFORMABLE = True

BLOCKS = (32, 64, 128)
"""The least that reaches over the window is the fastest on a CPU, up to 128: at T = 4096, twice as fast as 128 for a
window of 16 or 64, and 128 is faster than 64 and 256 for windows of 128 and 512."""


def unsupported(inputs: AttentionInputs) -> str | None:
    return None if inputs.window else "there is no window, so every query sees all keys before it"


def run(inputs: AttentionInputs, plain: bool = False) -> Tensor | parallel_sdpa.Results:
    """With ``plain``, by functions of torch that have derivatives of any kind."""
    q, k, v, window = inputs.q, inputs.k, inputs.v, inputs.window
    batch, queries = q.shape[:2]
    size = next((size for size in BLOCKS if size >= window - 1), BLOCKS[-1])
    count = -(-queries // size)
    seen = 1 + -(-(window - 1) // size)  # blocks of keys for a block of queries, its own included
    if seen * size >= _span(inputs):
        return parallel_sdpa.run(inputs, plain)
    shift = k.shape[1] - queries  # the position of the first query
    after = count * size - queries
    before = (seen - 1) * size - shift  # negative where the first keys are out of reach of every query

    def key_blocks(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (before, after)).unflatten(1, (count + seen - 1, size))
        return torch.cat([x[:, i : i + count] for i in range(seen)], dim=2).flatten(0, 1)

    blocks = F.pad(q, (0, 0, 0, 0, 0, after)).reshape(batch * count, size, *q.shape[2:])
    earliest = F.pad(_earliest(inputs), (0, after))
    mask = _visible(earliest.unflatten(1, (count, size)), shift, seen)
    mask = mask.expand(batch, -1, -1, -1).reshape(batch * count, 1, size, seen * size)
    bias = None if inputs.key_bias is None else key_blocks(inputs.key_bias)
    options = {"plain": plain, "logit_cap": inputs.logit_cap, "return_lse": inputs.return_lse, "key_bias": bias}
    found = parallel_sdpa.sdpa(blocks, key_blocks(k), key_blocks(v), inputs.scale, mask, **options)
    found = tuple(each.reshape(batch, count * size, *each.shape[2:])[:, :queries] for each in found)
    return found if inputs.return_lse else found[0]


def _span(inputs: AttentionInputs) -> int:
    """How many keys the queries of one sequence see together, at most."""
    if inputs.offsets is None:
        return min(inputs.k.shape[1], inputs.q.shape[1] + inputs.window - 1)
    return max(end - start for start, end in pairwise(inputs.offsets))


def _earliest(inputs: AttentionInputs) -> Tensor:
    """The first position that each query may see: ``[1, Tq]``, or ``[B, Tq]`` with ``key_start``."""
    queries, device = inputs.q.shape[1], inputs.device
    first = inputs.k.shape[1] - queries - inputs.window + 1
    earliest = torch.arange(first, first + queries, device=device).clamp(min=0)[None]
    if inputs.key_start is not None:
        return torch.maximum(earliest, inputs.key_start[:, None])
    if inputs.offsets is not None:
        bounds = torch.tensor(inputs.offsets, device=device)
        return torch.maximum(earliest, bounds[:-1].repeat_interleave(bounds.diff(), output_size=queries))
    return earliest


def _visible(earliest: Tensor, shift: int, seen: int) -> Tensor:
    """Booleans ``[B, blocks, size, seen * size]`` from each query's first visible position ``[B, blocks, size]``."""
    blocks, size = earliest.shape[1:]
    block = torch.arange(blocks, device=earliest.device)[:, None] * size + shift
    query = block + torch.arange(size, device=earliest.device)
    key = block + torch.arange((1 - seen) * size, size, device=earliest.device)
    return (key[:, None] <= query[..., None]) & (key[:, None] >= earliest[..., None])
