"""What the fast backends share: lists in a plain form, memory as rows, and their custom operators.

An entry of a plain list is ``2 * block``, or ``2 * block + 1`` for a block of which only the window is seen, or -1 for
nothing. No block is there twice, and none begins after the query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention import parallel_torch
from seqarch.ops.block_sparse_attention.starts import sequence_starts
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.native.custom_op import Formula, Saved, define
from seqarch.ops.native.huge_pages import in_huge_pages


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


def blocks_of(entries: Tensor) -> Tensor:
    """The blocks that plain lists name: without those of which only the window is seen."""
    return torch.where((entries >= 0) & (entries % 2 == 0), entries >> 1, -1)


def differentiable(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], blocks: Callable[[Tensor], Tensor] = blocks_of
) -> Callable[..., Any]:
    """A custom operator, which compilers leave whole: its loop over chunks stays a loop, its memory bounded.

    ``forward(q, k, v, entries, first, block_size, window, scale)`` gives o and the logarithm of each softmax's sum,
    ``backward(do, q, k, v, entries, first, o, log_sum, block_size, window, scale)`` the gradients of q, k and v.
    ``blocks`` gives the lists of blocks that such entries stand for.
    """

    def differentiate(call: Saved, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gradient(do, *call.inputs[:5], *call.kept, *call.inputs[5:])

    def plain(
        q: Tensor, k: Tensor, v: Tensor, entries: Tensor, first: Tensor, block_size: int, window: int, scale: float
    ) -> Tensor:
        return parallel_torch.attend(q, k, v, blocks(entries), first, block_size, window, scale)

    operator, gradient = define(
        name, forward, backward, lambda q, k, v, *_: outputs(q, k, v),
        lambda do, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
        Formula(differentiate, plain, keeps=(0, 1)),
    )  # fmt: skip
    return operator


def outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for o ``[B, Tq, H, V]`` and the logarithms of the softmax's sums ``[B, Tq, H]``."""
    o = in_huge_pages(v.new_empty(*q.shape[:3], v.shape[3]))
    return o.zero_(), torch.zeros(q.shape[:3], dtype=accumulation_dtype(q, k, v), device=q.device)
