"""An n-gram model of bytes: interpolated Kneser-Ney smoothing with three discounts.

Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", section 3: with c the count
of a byte w after the bytes h, N the sum of the counts after h, and h' what is left of h without its first byte,

    P(w | h) = (c - D(c)) / N + g(h) P(w | h'),   g(h) = (D1 n1 + D2 n2 + D3 n3) / N,

n1, n2 and n3 the number of bytes that follow h once, twice, and more often. Counts are those of the text at the
highest order; below it, the number of different symbols before an n-gram, or its count where it begins with the start
of a file, which nothing precedes. After an h that was never seen P(w | h) is P(w | h'); below single bytes all 256 are
equally likely. The discounts are estimated per order from how many n-grams occur 1 to 4 times; where some of these
numbers are 0, or a discount would come out beyond its count, they are 0.5, 1 and 1.5, as in Heafield et al. 2013,
"Scalable Modified Kneser-Ney Language Model Estimation".

An n-gram is one 64-bit number of 9 bits a symbol, and all counting is sorting.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

HIGHEST_ORDER = 7
START = 256
BITS = 9
FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])


class Level(NamedTuple):
    """The n-grams of one order.

    Attributes:
        ngrams: ``[n]`` uint64, sorted.
        direct: ``[n]``, (c - D(c)) / N of each.
        contexts: ``[m]`` uint64, sorted: what precedes the last byte of some n-gram.
        passed: ``[m]``, g of each.
    """

    ngrams: np.ndarray
    direct: np.ndarray
    contexts: np.ndarray
    passed: np.ndarray


class ByteNgrams:
    """Probabilities of bytes given up to ``order - 1`` bytes before them, from the start of the file on.

    Args:
        texts: the files to count.
        order: bytes of the longest n-grams, 1 to :data:`HIGHEST_ORDER`.

    Raises:
        ValueError: another order, or no text.
    """

    def __init__(self, texts: Iterable[bytes], order: int = 6):
        if not 1 <= order <= HIGHEST_ORDER:
            raise ValueError(f"order must lie between 1 and {HIGHEST_ORDER}, got {order}")
        self.order = order
        packed = _ngrams(texts, order)
        if not len(packed):
            raise ValueError("an n-gram model needs at least one byte of text")
        packed.sort()
        ngrams, counts = _runs(packed)
        del packed
        self.levels = [_level(ngrams, counts)]
        for length in range(order - 1, 0, -1):
            ngrams, counts = _shorter(ngrams, counts, length)
            self.levels.append(_level(ngrams, counts))
        self.levels.reverse()

    def bits(self, text: bytes) -> np.ndarray:
        """``[len(text)]``, minus the binary logarithm of the probability of each byte of a file."""
        packed = _ngrams([text], self.order)
        probability = np.full(len(packed), 1 / 256)
        for length, level in enumerate(self.levels, 1):
            ngram = packed & np.uint64(2 ** (BITS * length) - 1)
            passed = _found(level.contexts, level.passed, ngram >> np.uint64(BITS), 1.0)
            probability = _found(level.ngrams, level.direct, ngram, 0.0) + passed * probability
        return -np.log2(probability)


def _ngrams(texts: Iterable[bytes], order: int) -> np.ndarray:
    """``[bytes of all texts]`` uint64, the n-gram that ends in each byte; before a file are start symbols."""
    parts = []
    for text in texts:
        symbols = np.full(order - 1 + len(text), START, np.uint64)
        symbols[order - 1 :] = np.frombuffer(text, np.uint8)
        packed = np.zeros(len(text), np.uint64)
        for place in range(order):
            packed <<= np.uint64(BITS)
            packed |= symbols[place : place + len(text)]
        parts.append(packed)
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different numbers of a sorted array, and how often each occurs."""
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else np.zeros(0, int)
    return ordered[begins], np.diff(np.append(begins, len(ordered)))


def _shorter(ngrams: np.ndarray, counts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams of ``length`` symbols, and how many different symbols precede each, from those one longer.

    Those that begin with a start symbol keep their counts. They are the largest numbers, as no symbol is above it.
    """
    ends = ngrams & np.uint64(2 ** (BITS * length) - 1)
    at_start = ends >> np.uint64(BITS * (length - 1)) == START
    inner, inner_counts = _runs(np.sort(ends[~at_start]))
    order = np.argsort(ends[at_start])
    return np.concatenate([inner, ends[at_start][order]]), np.concatenate([inner_counts, counts[at_start][order]])


def _level(ngrams: np.ndarray, counts: np.ndarray) -> Level:
    discounts = _discounts(counts)
    few = np.minimum(counts, 3)
    contexts, sizes = _runs(ngrams >> np.uint64(BITS))
    begins = np.cumsum(sizes) - sizes
    totals = np.add.reduceat(counts, begins)
    taken = np.add.reduceat(discounts[few], begins)
    return Level(ngrams, (counts - discounts[few]) / np.repeat(totals, sizes), contexts, taken / totals)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """``[4]``, D of n-grams that occur 0, 1, 2 and 3 times or more."""
    n1, n2, n3, n4 = (int((counts == number).sum()) for number in (1, 2, 3, 4))
    if min(n1, n2, n3) == 0:
        return FALLBACK
    share = n1 / (n1 + 2 * n2)
    found = np.array([0, 1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3])
    return found if (found[1:] > 0).all() and (found <= [0, 1, 2, 3]).all() else FALLBACK


def _found(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, otherwise: float) -> np.ndarray:
    """The value of each wanted key, or another number where the key is not there."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], otherwise)
