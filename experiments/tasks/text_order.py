"""Which window of which source an example is: a function of (seed, index), with no list of windows in memory.

A source is cut into windows from end to end, at another place in each pass. A pass takes each window once, in an order
that a keyed permutation of the numbers below their count gives: a Feistel network, walked on until it falls below the
count (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Of several sources every stretch of 4096
examples has its share of each, in an order drawn anew.
"""

from __future__ import annotations

import hashlib

import numpy as np

from experiments.tasks.task import stream, uniforms

STRETCH = 4096
ROUNDS = 4


def key_of(seed: int, purpose: str) -> int:
    """A number of 64 bits for each seed and purpose."""
    return int.from_bytes(hashlib.sha256(f"{seed}/text/{purpose}".encode()).digest()[:8], "little")


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Numbers of 64 bits in which each bit depends on all: the finaliser of SplitMix64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def keys(key: int, numbers: np.ndarray, purpose: int) -> np.ndarray:
    """A key of 64 bits for each number."""
    return _mixed(_mixed(numbers.astype(np.uint64) + np.uint64(key)) + np.uint64(purpose + 1))


def permuted(places: np.ndarray, count: int, by: np.ndarray) -> np.ndarray:
    """Where permutations of 0 .. ``count`` - 1 lead to from these places.

    Args:
        places: ``[n]``, below ``count``.
        by: ``[n]`` uint64, the key of the permutation that each place is taken through.
    """
    half = np.uint64(max(1, -(-int(count - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    found = places.astype(np.uint64)
    left = np.arange(len(found))
    while len(left):
        high, low = found[left] >> half, found[left] & mask
        for number in range(ROUNDS):
            high, low = low, high ^ (_mixed(_mixed(low + np.uint64(number << 40)) ^ by[left]) & mask)
        found[left] = (high << half) | low
        left = left[found[left] >= count]
    return found.astype(np.int64)


def window_starts(key: int, indices: np.ndarray, tokens: int, length: int) -> np.ndarray:
    """``[n]`` int64, where in a source the windows of these examples of it begin; each reads ``length + 1`` tokens.

    Args:
        tokens: of the source, at least ``length + 1``.
    """
    count = max(1, (tokens - length) // length)
    passes = indices // count
    room = np.uint64(min(length, tokens - count * length))
    first = (keys(key, passes, 0) % room).astype(np.int64)
    return first + permuted(indices % count, count, keys(key, passes, 1)) * length


def dealt(shares: list[float]) -> np.ndarray:
    """How many examples of a stretch each source has, by its share: whole numbers, the largest remainders rounded up.

    Raises:
        ValueError: one would have none.
    """
    exact = np.array(shares) / sum(shares) * STRETCH
    counts = exact.astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: STRETCH - counts.sum()]] += 1
    if not counts.all():
        raise ValueError(f"a source has less than 1/{STRETCH} of the examples")
    return counts


def deal(seed: int, indices: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the source of each example, and which example of that source it is."""
    if len(counts) == 1:
        return np.zeros(len(indices), np.int64), indices
    source, within = np.empty_like(indices), np.empty_like(indices)
    dealt_out = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    for stretch in np.unique(indices // STRETCH):
        of = indices // STRETCH == stretch
        order = np.argsort(uniforms(stream(seed, "train", "sources"), int(stretch) * STRETCH, STRETCH, 1)[:, 0])
        card = order[indices[of] % STRETCH]
        source[of] = dealt_out[card]
        within[of] = stretch * counts[dealt_out[card]] + ranks[card]
    return source, within
