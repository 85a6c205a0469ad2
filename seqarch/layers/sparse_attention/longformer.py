"""Longformer's pattern, to the past: a window of tokens, and the first tokens of the sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from seqarch import ops
from seqarch.layers.attention.base import Place
from seqarch.layers.sparse_attention.base import BlockSparse, BlockSparseConfig
from seqarch.ops.attention import flops as attention_flops


@dataclass(frozen=True, kw_only=True)
class LongformerConfig(BlockSparseConfig):
    """Options of :class:`Longformer`.

    Attributes:
        block_size: tokens of a block of global tokens; no effect on the result.
        window: tokens that each token sees, itself included.
        global_tokens: first tokens of the sequence, which all later ones see; a multiple of ``block_size``.
    """

    block_size: int = 16
    size_options: ClassVar[dict[str, str]] = {"window": "window", **BlockSparseConfig.size_options}

    window: int = 512
    global_tokens: int = 16

    def __post_init__(self):
        super().__post_init__()
        if self.global_tokens % self.block_size:
            raise ValueError(
                f"global_tokens ({self.global_tokens}) must be a multiple of block_size ({self.block_size}): try"
                f" block_size {math.gcd(self.global_tokens, self.block_size)}"
            )


class Longformer(BlockSparse):
    """Softmax attention over the last ``window`` tokens and the first ``global_tokens`` of the sequence.

    Beltagy et al. 2020, "Longformer: The Long-Document Transformer", section 3.1, to the past only: global tokens are
    those that every later one sees, and see what is before them. Not
    :class:`~seqarch.layers.attention.attention.SlidingWindow`, which forgets the start. One set of
    projections serves both, where the paper has a second for the attention of global tokens; windows are not dilated.
    The cache holds the window and the global tokens alone.
    """

    Config = LongformerConfig

    @property
    def window(self) -> int:
        return self.config.window

    @property
    def cache_window(self) -> int:
        return self.config.global_tokens + self.config.window - 1

    @property
    def sink_tokens(self) -> int:
        return self.config.global_tokens

    def select(self, q: Tensor, k: Tensor, place: Place, *entries: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        begun = -(-place.length // self.config.block_size)
        blocks = torch.arange(min(self.config.global_tokens // self.config.block_size, begun), device=q.device)
        return (blocks.expand(*k.shape[:3], -1),), ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *selection: Tensor, **where: Any) -> Tensor:
        if q.shape[1] == 1:  # the cache holds what one token sees and nothing else
            return ops.attention(q, k, v, **where)
        return super().attend(q, k, v, *selection, **where)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        """Of the window, and of the global tokens that have left it."""
        config = self.config
        widths = (config.heads, config.head_width, config.head_width, True)
        past = max(0, length - config.window)
        return attention_flops(length, length, *widths, config.window, batch_size) + attention_flops(
            past, past, *widths, config.global_tokens, batch_size
        )
