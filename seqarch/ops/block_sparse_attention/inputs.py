"""The inputs of ``block_sparse_attention``, and those of its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class BlockSparseAttentionInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.block_sparse_attention`.

    Attributes:
        q: ``[B, Tq, H, K]``.
        k: ``[B, Tk, G, K]``; query head h uses head ``h // (H / G)``.
        v: ``[B, Tk, G, V]``.
        block_index: ``[B, Tq, I, S]``, int64: the blocks of each query, -1 for none; head h uses ``h // (H / I)``.
        block_size: tokens of a block, no more than there are where these are many.
        window: how many of the last keys a query sees, listed or not, no more than there are; 0 for no window.
        scale: of the scores.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
        key_start: ``[B]``, from 0 to Tk, the first key of each row that is not padding, or ``None``.
        return_lse: whether the result is ``(o, lse)``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_index: Tensor
    block_size: int
    window: int
    scale: float
    offsets: tuple[int, ...] | None
    key_start: Tensor | None
    return_lse: bool = False

    def positions(self, first: Tensor) -> Tensor:
        """Of queries in their sequences, which begin at ``first``: ``[B or 1, Tq]``; negative before them."""
        keys = self.k.shape[1]
        return torch.arange(keys - self.length, keys, device=self.device) - first

    def blind(self) -> Tensor:
        """Which queries see no key, ``[B, Tq, H]``."""
        position, index = self.positions(sequence_starts(self))[..., None, None], self.block_index
        seen = ((index >= 0) & (index <= position // self.block_size)).any(-1)
        if self.window:
            seen = seen | (position.squeeze(-1) >= 0)
        return ~seen.repeat_interleave(self.q.shape[2] // index.shape[2], dim=2)


@dataclass(frozen=True)
class ListInputs(Inputs):
    """The kernels' inputs: as above, with the start of each query's sequence in place of packing and padding.

    Attributes:
        lists: ``[B, Tq, I, S]``: blocks as in ``block_index``, or entries as of :func:`.lists.plain_lists`.
        first: ``[B, Tq]`` or ``[1, Tq]``, int64: where the keys of each query's sequence begin.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lists: Tensor
    first: Tensor
    block_size: int
    window: int
    scale: float

    @classmethod
    def of(cls, inputs: BlockSparseAttentionInputs) -> ListInputs:
        """Those of a call, with the lists as they are."""
        first = sequence_starts(inputs)
        return cls(
            inputs.q, inputs.k, inputs.v, inputs.block_index, first, inputs.block_size, inputs.window, inputs.scale
        )

    def to(self, dtype: torch.dtype) -> ListInputs:
        """The same with q, k and v in this dtype."""
        return self.replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def empty(self) -> bool:
        """Whether there is nothing to compute: no query sees anything, or has no numbers."""
        return not self.q.numel() * self.k.numel() * self.v.numel() * self.lists.numel()


def sequence_starts(inputs: BlockSparseAttentionInputs) -> Tensor:
    """Where the keys of each query's sequence begin: ``[1, Tq]`` or ``[B, Tq]``."""
    queries, device, offsets = inputs.length, inputs.device, inputs.offsets
    if offsets is not None:
        lengths = torch.tensor([end - start for start, end in pairwise(offsets)], device=device)
        return torch.tensor(offsets[:-1], device=device).repeat_interleave(lengths, output_size=queries)[None]
    if inputs.key_start is not None:
        return inputs.key_start.long()[:, None].expand(-1, queries)
    return torch.zeros(1, queries, dtype=torch.int64, device=device)
