"""The inputs of ``index_topk``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from seqarch.ops.chunked.packing import split_sequences
from seqarch.ops.dispatch.inputs import Inputs


@dataclass(frozen=True)
class IndexTopKInputs(Inputs):
    """The checked arguments of one call of :func:`seqarch.ops.index_topk`.

    Attributes:
        q: the indexer's queries, ``[B, Tq, H, K]``.
        k: its keys, ``[B, Tk, K]``.
        weight: of each query's heads, ``[B, Tq, H]``.
        top_k: tokens of a list, Tk at most.
        offsets: the boundaries of packed sequences, from 0 to T; ``None`` where nothing is packed.
        key_start: ``[B]``, from 0 to Tk, the first token of each row that is not padding, or ``None``.
    """

    q: Tensor
    k: Tensor
    weight: Tensor
    top_k: int
    offsets: tuple[int, ...] | None
    key_start: Tensor | None

    def sequences(self, offsets: tuple[int, ...]) -> Iterator[IndexTopKInputs]:
        """Each packed sequence for itself."""
        for q, k, weight in split_sequences(offsets, self.q, self.k, self.weight):
            yield self.replace(q=q, k=k, weight=weight, offsets=None)
