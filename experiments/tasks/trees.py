"""Random trees of operators and digits, many at a time, level by level; their values, and how they are written.

Every node has a 64-bit key: its own draws and the keys of its children are made from it, so that a tree is a function
of its root's key alone, whatever other trees are grown beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DIGITS = 10
OPERATORS = ("MIN", "MAX", "MED", "SM")
CLOSE, BLANK = DIGITS + len(OPERATORS), DIGITS + len(OPERATORS) + 1
"""Tokens: ten digits, the operators with their opening bracket, the closing bracket, and what follows a formula."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Level:
    """The nodes of one depth, those of a parent side by side.

    Attributes:
        tree, parent: ``[N]``, which tree a node belongs to, and its parent's number in the level above.
        token: ``[N]``, a digit or ``DIGITS`` + the number of an operator.
        arguments: ``[N]``, how many children: 0 for digits.
        keys: ``[N]`` uint64.
    """

    tree: np.ndarray
    parent: np.ndarray
    token: np.ndarray
    arguments: np.ndarray
    keys: np.ndarray


def mixed(words: np.ndarray) -> np.ndarray:
    """Words ``[...]`` uint64 scrambled one to one: the finaliser of SplitMix64 (Steele et al. 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def below(keys: np.ndarray, purpose: int, limit: int) -> np.ndarray:
    """An int64 of 0 .. ``limit`` - 1 for each key, a stream of its own for each purpose."""
    words = mixed(keys ^ mixed(np.full(1, purpose, np.uint64) * GOLDEN))
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53 * limit).astype(np.int64)


def grow(roots: np.ndarray, depth: int, most: int, operators: float, longest: int) -> tuple[list[Level], np.ndarray]:
    """Trees from their roots' keys ``[N]``, each root an operator.

    Args:
        depth: levels at most; the last one has digits alone.
        most: arguments of an operator at most; 2 to ``most`` are as likely.
        operators: the probability that an argument is an operator.
        longest: a tree that is sure to have more tokens is not grown on.

    Returns:
        The levels, and for each tree its number of tokens, ``longest + 1`` where it was not grown on.
    """
    levels, sizes = [], np.zeros(len(roots), dtype=np.int64)
    tree, parent, keys = np.arange(len(roots)), np.full(len(roots), -1), roots
    while len(keys):
        last = len(levels) + 1 == depth
        operator = np.zeros(len(keys), bool) if last else below(keys, 1, 2**40) < operators * 2**40
        operator |= not levels
        token = np.where(operator, DIGITS + below(keys, 2, len(OPERATORS)), below(keys, 2, DIGITS))
        arguments = np.where(operator, 2 + below(keys, 3, most - 1), 0)
        levels.append(Level(tree, parent, token, arguments, keys))
        sizes += np.bincount(tree, np.where(operator, 2, 1), len(roots)).astype(np.int64)
        expected = sizes + np.bincount(tree, arguments, len(roots)).astype(np.int64)
        sizes = np.where(expected > longest, longest + 1, sizes)
        parent = np.repeat(np.arange(len(keys)), np.where(expected[tree] > longest, 0, arguments))
        number = np.arange(len(parent)) - np.searchsorted(parent, parent)
        keys = mixed(keys[parent] + (number + 1).astype(np.uint64) * GOLDEN)
        tree = tree[parent]
    return levels, sizes


def evaluate(levels: list[Level]) -> list[np.ndarray]:
    """The value of every node, level by level."""
    worth = [level.token.copy() for level in levels]
    for number in range(len(levels) - 2, -1, -1):
        below_it, values = levels[number + 1], worth[number + 1]
        if not len(values):
            continue
        values = values[np.lexsort((values, below_it.parent))]  # Siblings side by side, the smallest first.
        nodes, first, count = np.unique(below_it.parent, return_index=True, return_counts=True)
        middle = (values[first + (count - 1) // 2] + values[first + count // 2]) // 2
        results = np.stack([values[first], values[first + count - 1], middle, np.add.reduceat(values, first) % DIGITS])
        worth[number][nodes] = results[levels[number].token[nodes] - DIGITS, np.arange(len(nodes))]
    return worth


def write(levels: list[Level], length: int) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Formulas ``[N, length]`` in prefix order, blanks after them; where each node ends, and its number of tokens."""
    sizes = [np.where(level.arguments > 0, 2, 1) for level in levels]
    for number in range(len(levels) - 1, 0, -1):
        sizes[number - 1] += np.bincount(levels[number].parent, sizes[number], len(sizes[number - 1])).astype(np.int64)
    text = np.full((len(levels[0].tree), length), BLANK, dtype=np.int64)
    begins, ends = np.zeros(len(levels[0].tree), dtype=np.int64), []
    for level, size in zip(levels, sizes, strict=True):
        if len(ends):
            before = np.cumsum(size) - size  # Of the level; minus that of the first sibling, of the siblings.
            begins = begins[level.parent] + 1 + before - before[np.searchsorted(level.parent, level.parent)]
        text[level.tree, begins] = level.token
        ends.append(begins + size - 1)
        operator = level.arguments > 0
        text[level.tree[operator], ends[-1][operator]] = CLOSE
    return text, ends, sizes
