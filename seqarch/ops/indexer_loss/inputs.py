"""The inputs of ``indexer_loss``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import split_sequences
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class IndexerLossInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.indexer_loss`.

    Attributes:
        index_q: the indexer's queries, ``[B, Tq, Hi, Ki]``.
        index_k: its keys, ``[B, Tk, Ki]``.
        weight: of each query's index heads, ``[B, Tq, Hi]``.
        q: the attention's queries, ``[B, Tq, H, K]``.
        k: its keys, ``[B, Tk, G, K]``; query head h uses head ``h // (H / G)``.
        token_index: ``[B, Tq, S]``, int64: the tokens that each query chose, from its row's first; ``None`` for all.
        scale: of the attention's scores.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
        key_start: ``[B]``, from 0 to Tk, the first token of each row that is not padding, or ``None``.
    """

    index_q: Tensor
    index_k: Tensor
    weight: Tensor
    q: Tensor
    k: Tensor
    token_index: Tensor | None
    scale: float
    offsets: tuple[int, ...] | None
    key_start: Tensor | None

    def sequences(self, offsets: tuple[int, ...]) -> Iterator[IndexerLossInputs]:
        """Each packed sequence for itself."""
        names = "index_q", "index_k", "weight", "q", "k", "token_index"
        for parts in split_sequences(offsets, *(getattr(self, name) for name in names)):
            yield self.replace(**dict(zip(names, parts, strict=True)), offsets=None)

    def widened(self) -> IndexerLossInputs:
        """The same with the indexer's numbers in the dtype of scores, and without a gradient for the attention's."""
        wide = accumulation_dtype(self.index_q, self.index_k, self.weight, self.q, self.k)
        indexer = {name: getattr(self, name).to(wide) for name in ("index_q", "index_k", "weight")}
        return self.replace(**indexer, q=self.q.detach(), k=self.k.detach())

    def zeros(self) -> Tensor:
        """No loss ``[B]``, with a gradient of zeros."""
        return 0 * torch.stack([x.flatten(1).sum(1) for x in (self.index_q, self.index_k, self.weight)]).sum(0)
