"""Blocks of tokens that one key and value stand for, and blocks to select by the weights of those."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.chunked.queries import largest


class Blocks(NamedTuple):
    """Compressed blocks ``[stride i, stride i + length)`` and selectable blocks ``[size j, size (j + 1))`` of tokens.

    Attributes:
        length, stride: of compressed blocks; the stride divides ``length`` and ``size``.
        size: of blocks to select.
        count: blocks that a query selects.
        initial, local: of these, the sequence's first and the query's last (its own included) in any case.
    """

    length: int
    stride: int
    size: int
    count: int
    initial: int
    local: int

    @classmethod
    def of(cls, options: Any) -> Blocks:
        """Those of an object that names the sizes as the operation's arguments do."""
        return cls(
            options.compressed_length,
            options.compressed_stride,
            options.block_size,
            options.selected_blocks,
            options.initial_blocks,
            options.local_blocks,
        )

    def complete(self, tokens: int) -> int:
        """Compressed blocks that lie within so many tokens."""
        return max(0, (tokens - self.length) // self.stride + 1)

    def selectable(self, tokens: int) -> int:
        """Selectable blocks that so many tokens begin."""
        return -(-tokens // self.size)

    def listed(self, tokens: int) -> int:
        """Entries of a list where there are so many tokens."""
        return min(self.count, self.selectable(tokens))

    def compressed_pairs(self, tokens: int) -> int:
        """Complete compressed blocks that so many queries see together."""
        strides, rest = divmod(max(0, tokens - self.length + 1), self.stride)
        return self.stride * strides * (strides + 1) // 2 + rest * (strides + 1)

    def visible_pairs(self, tokens: int) -> int:
        """Tokens of their lists up to themselves that so many queries see together: their own block is in any case."""
        most = self.count - 1  # whole blocks before the own one
        whole, rest = divmod(tokens, self.size)
        growing = min(whole, most + 1)
        before = growing * (growing - 1) // 2 + (whole - growing) * most
        own = whole * self.size * (self.size + 1) // 2 + rest * (rest + 1) // 2
        return own + self.size * (self.size * before + rest * min(whole, most))


def importance(weights: Tensor, blocks: Blocks, count: int) -> Tensor:
    """The importance of the first ``count`` selectable blocks, by the weights of compressed ones ``[..., M]``.

    Block j gets the sum over m < size / stride, n < length / stride of ``weights[(size / stride) j + m - n]``: each
    compressed block that overlaps it, times the strides that they share.
    """
    if not weights.shape[-1]:  # a compressed block may be longer than all blocks that have begun
        return weights.new_zeros(*weights.shape[:-1], count)
    overlap, pieces = blocks.length // blocks.stride, count * (blocks.size // blocks.stride)  # of one stride each
    if count == 1:  # the block may be longer than the sequence
        pieces = min(pieces, weights.shape[-1] + overlap - 1)
    spread = [F.pad(weights, (n, pieces - weights.shape[-1] - n)) for n in range(overlap)]
    return torch.stack(spread).sum(0).unflatten(-1, (count, -1)).sum(-1)


def select_blocks(scores: Tensor, position: Tensor, blocks: Blocks) -> Tensor:
    """The lists ``[B, C, G, S]`` of the queries at ``position [B or 1, C]``, by ``scores [B, G, C, J]`` of each block.

    The forced blocks first, then those of the largest scores, equal ones from the first on; -1 where fewer begin by
    then. The query's own block is a candidate as any other.
    """
    own = position[:, None, :, None] // blocks.size
    block = torch.arange(scores.shape[-1], device=scores.device)
    forced = (block < blocks.initial) | (block > own - blocks.local)
    ranked = scores.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    chosen = largest(ranked, blocks.count)
    return chosen.masked_fill(chosen > own, -1).transpose(1, 2)
