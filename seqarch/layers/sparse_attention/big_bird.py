"""BigBird's pattern, to the past: blocks near, first and at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from seqarch.layers.attention.base import Place
from seqarch.layers.modules.positions import block_of
from seqarch.layers.sparse_attention.base import BlockSparse, BlockSparseConfig


@dataclass(frozen=True, kw_only=True)
class BigBirdConfig(BlockSparseConfig):
    """Options of :class:`BigBird`.

    Attributes:
        window_blocks: last blocks that a query sees, its own included.
        global_blocks: first blocks of the sequence, which all later ones see.
        random_blocks: other earlier blocks that a block of queries sees, drawn for each key head.
        seed: of the draws; layers that should not see the same blocks take different ones.
    """

    window_blocks: int = 3
    global_blocks: int = 2
    random_blocks: int = 3
    seed: int = 0

    may_be_zero: ClassVar[tuple[str, ...]] = ("conv_width", "global_blocks", "random_blocks", "seed")


class BigBird(BlockSparse):
    """Softmax attention over the last ``window_blocks``, the first ``global_blocks`` and some blocks between at random.

    Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences", section 2, in the blocks of its appendix D, with
    its numbers of blocks, to the past only: the window reaches back alone, and global blocks are those that every later
    one sees. The random blocks of a block of queries are a function of seed, head and position, without repetition, so
    that every call and every split draws the same. The cache holds all tokens, since any block may be drawn later; the
    work per token stays constant.
    """

    Config = BigBirdConfig

    def select(self, q: Tensor, k: Tensor, place: Place, *entries: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        config, own = self.config, block_of(place.positions, self.config.block_size)
        begun = -(-place.length // config.block_size)
        near = own[..., None] - torch.arange(min(config.window_blocks, begun), device=own.device)
        near = near.clamp(min=-1)
        first = torch.arange(min(config.global_blocks, begun), device=own.device).expand(*own.shape, -1)
        fixed = torch.cat([near, first], dim=-1).unsqueeze(2).expand(-1, -1, config.kv_heads, -1)
        blocks = torch.cat([fixed, self._random_blocks(own, begun)], dim=-1)
        return (blocks.expand(k.shape[0], -1, -1, -1),), ()

    def _random_blocks(self, own: Tensor, begun: int) -> Tensor:
        """``[..., G, random_blocks]`` between the global blocks and the window; later ones where these are too few.

        Where they are too few for every query, of so many blocks that have begun, as many as there are.
        """
        config = self.config
        window, count = min(config.window_blocks, begun), min(config.global_blocks, begun)
        between, most = (own - (window - 1) - count)[..., None], max(0, begun - window - count)
        if config.random_blocks >= most:
            block = torch.arange(most, device=own.device).expand(*own.shape, config.kv_heads, -1)
            return torch.where(block < between[..., None], block, own[..., None, None] + 1) + count
        head = torch.arange(config.kv_heads, device=own.device)
        drawn = own.new_zeros(*own.shape, config.kv_heads, 0)
        for draw in range(config.random_blocks):
            left = between - draw
            block = _mixed(own[..., None], head, draw, config.seed) % left.clamp(min=1)
            for earlier in drawn.unbind(-1):  # in ascending order: one step past each that is taken
                block = block + (block >= earlier)
            block = torch.where(left > 0, block, own[..., None] + 1)
            drawn = torch.cat([drawn, block[..., None]], dim=-1).sort(dim=-1).values
        return drawn + count

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        config = self.config
        earlier = config.window_blocks - 1 + config.global_blocks + config.random_blocks
        return self.earlier_block_flops(earlier, length, batch_size)


def _mixed(block: Tensor, head: Tensor, draw: int, seed: int) -> Tensor:
    """A number of 31 bits from four, by multiplications and shifts (those of SplitMix, Steele et al. 2014)."""
    x = block * 0x1F123BB5 + head
    # the shifts here also keep torch's compiler from multiplying the constants out, which overflows
    for number, factor in ((draw, 0x27D4EB2F), (seed, 0x165667B1)):
        x = (x ^ (x >> 29)) * factor + number
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ (x >> shift)) * factor
    return x & 0x7FFFFFFF
