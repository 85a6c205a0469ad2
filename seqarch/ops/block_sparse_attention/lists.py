"""What the fast backends share: lists in a plain form, memory as rows, and their custom operators.

An entry of a plain list is ``2 * block``, or ``2 * block + 1`` for a block of which only the window is seen, or -1 for
nothing. No block is there twice, and none begins after the query.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.common.checks import accumulation_dtype
from seqarch.ops.common.memory import in_huge_pages
from seqarch.ops.common.operators import define


def run(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_size: int,
    window: int,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> Tensor:
    """What a fast backend does with the prepared arguments, by its operator."""
    first = sequence_starts(q.shape[1], offsets, key_start, q.device)
    position = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device) - first
    return attend(q, k, v, plain_lists(block_index, position, block_size, window), first, block_size, window, scale)[0]


def sequence_starts(
    queries: int, offsets: tuple[int, ...] | None, key_start: Tensor | None, device: torch.device
) -> Tensor:
    """Where the keys of each query's sequence begin: ``[1, Tq]`` or ``[B, Tq]``."""
    if offsets is not None:
        lengths = torch.tensor([end - start for start, end in pairwise(offsets)], device=device)
        return torch.tensor(offsets[:-1], device=device).repeat_interleave(lengths, output_size=queries)[None]
    if key_start is not None:
        return key_start.long()[:, None].expand(-1, queries)
    return torch.zeros(1, queries, dtype=torch.int64, device=device)


def plain_lists(block_index: Tensor, position: Tensor, block_size: int, window: int) -> Tensor:
    """``[B, Tq, I, S]``, or with a window as many more entries as it has blocks."""
    own = (position // block_size)[..., None, None]
    entries = torch.where((block_index >= 0) & (block_index <= own), 2 * block_index, -1)
    if window:
        near = own - torch.arange(-(-(window - 1) // block_size) + 1, device=own.device)
        near = torch.where(near >= 0, 2 * near + 1, -1).expand(*entries.shape[:3], -1)
        entries = torch.cat([entries, near], dim=-1)
    entries = entries.sort(dim=-1).values
    again = entries[..., 1:] >> 1 == entries[..., :-1] >> 1
    return torch.cat([entries[..., :1], entries[..., 1:].masked_fill(again, -1)], dim=-1)


def hidden(entries: Tensor, times: Tensor, at: Tensor, window: int) -> Tensor:
    """Whether a query that stands ``at`` a key does not see those at ``times``, in an entry's block; all broadcast."""
    unseen = (times > at) | (entries < 0)
    return unseen | ((entries % 2 == 1) & (at - times >= window)) if window else unseen


def rows(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``x [B, T, G, K]`` as rows of K, and how many rows a step along B, T and G is: a view where strides allow."""
    width = x.shape[3]
    if x.stride(3) != 1 or any(stride % width for stride in x.stride()[:3]):
        x = x.contiguous()
    steps = tuple(stride // width for stride in x.stride()[:3])
    count = 1 + sum((size - 1) * step for size, step in zip(x.shape, steps, strict=False))
    return x.as_strided((count, width), (width, 1)), steps


def differentiable(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """A custom operator, which compilers leave whole: its loop over chunks stays a loop, its memory bounded.

    ``forward(q, k, v, entries, first, block_size, window, scale)`` gives o and the logarithm of each softmax's sum,
    ``backward(do, q, k, v, entries, first, o, log_sum, block_size, window, scale)`` the gradients of q, k and v.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5], *output)
        ctx.options = inputs[5:]

    def differentiate(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(do.device.type, enabled=False):  # of whoever calls backward within its own
            return *gradient(do, *ctx.saved_tensors, *ctx.options), *[None] * 5

    operator, gradient = define(
        name, forward, backward, lambda q, k, v, *_: outputs(q, k, v),
        lambda do, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)), save, differentiate,
    )  # fmt: skip
    return operator


def outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for o ``[B, Tq, H, V]`` and the logarithms of the softmax's sums ``[B, Tq, H]``."""
    o = in_huge_pages(v.new_empty(*q.shape[:3], v.shape[3]))
    return o.zero_(), torch.zeros(q.shape[:3], dtype=accumulation_dtype(q, k, v), device=q.device)
