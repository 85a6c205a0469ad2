"""Parts of the fast backends: lists in a plain form, memory as rows, and their custom operators.

An entry of a plain list is ``2 * block``, or ``2 * block + 1`` for a block of which only the window is seen, or -1 for
nothing. No block is there twice, and none begins after the query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention import parallel_torch
from seqarch.ops.block_sparse_attention.inputs import BlockSparseAttentionInputs, ListInputs
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.native.custom_op import Operator, Upstream
from seqarch.ops.native.huge_pages import in_huge_pages


def attend(operators: ListOperators, inputs: BlockSparseAttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    """The results, by operators that take plain lists."""
    as_given = ListInputs.of(inputs)
    position = inputs.positions(as_given.first)
    lists = plain_lists(inputs.block_index, position, inputs.block_size, inputs.window)
    return operators(inputs, as_given.replace(lists=lists))


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
    """Whether a query at position ``at`` does not see those at ``times``, in an entry's block; all broadcast."""
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


class ListOperators:
    """A pair of kernels as two custom operators: of o alone, and of o and the logarithms of the softmax's sums.

    Both keep these logarithms for the backward pass, and the second has their gradient too. Compilers leave operators
    whole: a loop over chunks stays a loop, its memory bounded.

    Args:
        blocks: the blocks that entries of the operators' lists stand for.
        unit: natural logarithms in one of the kernel's.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[ListInputs], tuple[Tensor, Tensor]],
        backward: Callable[[ListInputs, Upstream], Sequence[Tensor]],
        blocks: Callable[[Tensor], Tensor] = blocks_of,
        unit: float = 1.0,
    ):
        def with_sums(inputs: ListInputs) -> tuple[Tensor, Tensor]:
            o, lse = parallel_torch.attend(inputs.replace(lists=blocks(inputs.lists)))
            return o, lse / unit

        def by_torch(inputs: ListInputs) -> Tensor:
            return with_sums(inputs)[0]

        self.unit = unit
        self.outputs = Operator(name, ListInputs, forward, backward, by_torch, zero_outputs, keeps=(0, 1))
        self.with_sums = Operator(
            f"{name}_lse", ListInputs, forward, backward, with_sums, zero_outputs, results=2, keeps=(0, 1)
        )

    def __call__(self, inputs: BlockSparseAttentionInputs, given: ListInputs) -> Tensor | tuple[Tensor, Tensor]:
        """o in v's dtype, and the logarithms where the call asks for them, of the lists that are ``given``."""
        if not inputs.return_lse:
            return self.outputs(given)[0]
        o, log_sum = self.with_sums(given)
        lse = log_sum * self.unit if self.unit != 1 else log_sum
        return o, lse.masked_fill(inputs.blind(), -torch.inf)


def zero_outputs(inputs: ListInputs) -> tuple[Tensor, Tensor]:
    """Zeros for o ``[B, Tq, H, V]`` and the logarithms of the softmax's sums ``[B, Tq, H]``."""
    q, k, v = inputs.q, inputs.k, inputs.v
    o = in_huge_pages(v.new_empty(*q.shape[:3], v.shape[3]))
    return o.zero_(), torch.zeros(q.shape[:3], dtype=accumulation_dtype(q, k, v), device=q.device)
