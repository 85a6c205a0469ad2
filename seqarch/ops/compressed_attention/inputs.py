"""The inputs of ``compressed_attention``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.compressed_attention.blocks import Blocks
from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class CompressedAttentionInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.compressed_attention`.

    Attributes:
        q: ``[B, T, H, K]``; query head h uses head ``h // (H / G)``.
        k: of compressed blocks, ``[B, M, G, K]``, from each row's first token on.
        v: ``[B, M, G, V]``.
        compressed_length, compressed_stride: of compressed blocks, in tokens.
        block_size: of blocks to select, in tokens.
        selected_blocks, initial_blocks, local_blocks: to select; of these, the first and the last in any case.
        query_start: tokens before the first query.
        scale: of the scores.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
        key_start: ``[B]``, from 0 on, the first token of each row that is not padding, or ``None``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    compressed_length: int
    compressed_stride: int
    block_size: int
    selected_blocks: int
    initial_blocks: int
    local_blocks: int
    query_start: int
    scale: float
    offsets: tuple[int, ...] | None
    key_start: Tensor | None

    @property
    def blocks(self) -> Blocks:
        return Blocks.of(self)

    @property
    def tokens(self) -> int:
        """Tokens up to the last query."""
        return self.query_start + self.q.shape[1]

    def each_sequence(self, run: Run, offsets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Outputs and lists of packed sequences, joined along time; a shorter sequence's lists end in -1."""
        outputs, lists = zip(*map(run, self._sequences(offsets)), strict=True)
        entries = max(index.shape[-1] for index in lists)
        lists = [F.pad(index, (0, entries - index.shape[-1]), value=-1) for index in lists]
        return torch.cat(outputs, dim=1), torch.cat(lists, dim=1)

    def _sequences(self, offsets: tuple[int, ...]) -> Iterator[CompressedAttentionInputs]:
        """Each packed sequence for itself, with its own blocks."""
        lengths = [end - start for start, end in pairwise(offsets)]
        counts = [self.blocks.complete(length) for length in lengths]
        parts = self.q.split(lengths, 1), self.k.split(counts, 1), self.v.split(counts, 1)
        for q, k, v in zip(*parts, strict=True):
            yield self.replace(q=q, k=k, v=v, offsets=None)


Run = Callable[[CompressedAttentionInputs], tuple[Tensor, Tensor]]
