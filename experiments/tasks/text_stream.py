"""Documents streamed: where each row of a training batch is in the text, a function of (seed, row, batch).

A pass is a ring of documents in an order drawn anew, cut into as many arcs of one length as a batch has rows; each row
reads its arc window after window. So a row reads its documents from end to end and in order, all but the one that its
arc begins within. Of several sources a pass has whole documents of each, as near to its share as these allow: a source
goes through its own documents in an order drawn anew each time, and goes on there in the next pass.

What is shuffled are documents or, of more than 65,536, stretches of about equal length of documents in their order, so
that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from experiments.tasks.text_order import key_of, keys

MOST = 1 << 16
"""The most stretches of a source."""


class Piece(NamedTuple):
    """Tokens ``start`` to ``end`` of a source, which are within the documents ``first`` to ``last`` of it."""

    source: int
    start: int
    end: int
    first: int
    last: int


class Stretches(NamedTuple):
    """The stretches of a source: where each begins, and the number of its first document; both with the end."""

    begins: np.ndarray
    documents: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.begins)


def stretches(begins: np.ndarray) -> Stretches:
    """Those of documents that begin there, the last number being the end: a document each, or some where they are many.

    Args:
        begins: int64 ``[documents + 1]``.
    """
    count = len(begins) - 1
    numbers = np.arange(count)
    if count > MOST:
        numbers = np.unique(np.searchsorted(begins[:-1], np.arange(MOST) * begins[-1] // MOST))
        numbers = numbers[numbers < count]
    numbers = np.append(numbers, count)
    return Stretches(begins[numbers], numbers)


class Walk:
    """The way of rows through the documents of sources.

    Args:
        sources: the stretches of each.
        shares: of each in what is read; they add up to 1.
        rows: of a batch.
        length: tokens of a window.

    Raises:
        ValueError: the text is too short for a window of each row, or a share too small for a token of a pass.
    """

    def __init__(self, seed: int, sources: Sequence[Stretches], shares: Sequence[float], rows: int, length: int):
        self._seed, self._sources, self._length = seed, sources, length
        sizes = [int(each.begins[-1]) for each in sources]
        self._quotas = [round(share * sum(sizes)) for share in shares]
        self._windows = sum(sizes) // (rows * length)
        if not self._windows:
            raise ValueError(
                f"a batch has {rows} rows of {length} tokens, and the training split {sum(sizes):,} tokens in all;"
                " choose a smaller train.batch_size or task.length, or give more text"
            )
        if 0 in self._quotas:
            number = self._quotas.index(0)
            raise ValueError(
                f"source {number} has a share of {shares[number]:.2g} of the {sum(sizes):,} tokens of a pass, which is"
                " none of them; join it to another, or give it more weight"
            )
        self._ring = lru_cache(maxsize=2)(self._make_ring)

    def window(self, row: int, number: int) -> tuple[list[Piece], bool]:
        """Where the ``length + 1`` tokens of a row's window are, and whether the row jumps there from elsewhere.

        Args:
            number: of the batch, counted from 0.
        """
        turn, place = divmod(number, self._windows)
        source, stretch, ends = self._ring(turn)
        whole = int(ends[-1])
        first = int(keys(key_of(self._seed, "ring"), np.array([turn]), 0)[0] % np.uint64(whole))
        at = (first + (row * self._windows + place) * self._length) % whole
        pieces, left = [], self._length + 1
        index = int(np.searchsorted(ends, at, side="right"))
        while left:
            of = self._sources[source[index]]
            end = int(of.begins[stretch[index] + 1])
            start = end - (int(ends[index]) - at)
            taken = min(left, end - start)
            documents = (int(of.documents[stretch[index] + i]) for i in range(2))
            pieces.append(Piece(int(source[index]), start, start + taken, *documents))
            left, at, index = left - taken, at + taken, index + 1
            if index == len(ends):
                at, index = 0, 0
        return pieces, place == 0

    def _make_ring(self, turn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The stretches of a pass in their order: of which source, which of its own, and where each ends."""
        parts = [np.fromiter(self._of_source(number, turn), np.int64) for number in range(len(self._sources))]
        source = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        order = np.argsort(keys(key_of(self._seed, "pass"), np.arange(len(source)), turn), kind="stable")
        source, stretch = source[order], np.concatenate(parts)[order]
        sizes = np.empty(len(source), np.int64)
        for number, each in enumerate(self._sources):
            of = source == number
            sizes[of] = each.sizes[stretch[of]]
        return source, stretch, np.cumsum(sizes)

    def _of_source(self, number: int, turn: int) -> Iterator[int]:
        """The stretches of a source in a pass: those that begin in its part of all that it goes through, end to end."""
        sizes, quota = self._sources[number].sizes, self._quotas[number]
        low, high, whole = turn * quota, (turn + 1) * quota, int(sizes.sum())
        for round_ in range(low // whole, -(-high // whole)):
            key = key_of(self._seed, f"stream of source {number}")
            order = np.argsort(keys(key, np.arange(len(sizes)), round_), kind="stable")
            begins = round_ * whole + np.cumsum(sizes[order]) - sizes[order]
            yield from order[(low <= begins) & (begins < high)].tolist()
