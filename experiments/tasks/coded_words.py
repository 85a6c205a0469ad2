"""Words of random letters for long texts of many of them, as bytes, and the answers that name some of them."""

from __future__ import annotations

import numpy as np

from experiments.tasks.generated import Draws
from experiments.tasks.haystack import written

LETTERS = b"abcdefghijklmnopqrstuvwxyz"
WIDTH = 6
"""Letters of a word, as many as in RULER."""

SPACE = ord(" ")


def coded_words(draws: Draws, purpose: str, count: int) -> np.ndarray:
    """``[B, count, WIDTH]``: different words, in any order.

    Numbers that are drawn twice are set apart by counting each up by its rank, which takes no loop over thousands; that
    moves a word among 26^6 by at most ``count`` places of the alphabet.
    """
    drawn = draws.integers(purpose, count, len(LETTERS) ** WIDTH - count + 1)
    ranks = np.argsort(np.argsort(drawn, axis=1, kind="stable"), axis=1)
    return written(drawn + ranks, WIDTH, LETTERS)


def answered(words: np.ndarray) -> np.ndarray:
    """``[B, A (1 + WIDTH)]``: A words, a space before each."""
    spaces = np.full((*words.shape[:2], 1), SPACE)
    return np.concatenate([spaces, words], axis=2).reshape(len(words), -1)


def is_answer(length: int, count: int) -> np.ndarray:
    """``[T + 1]``: whether a byte of a text that ends in ``count`` answers is a letter of one."""
    place = np.arange(length + 1) - answers_begin(length, count)
    return (place >= 0) & (place % (1 + WIDTH) != 0)


def answers_begin(length: int, count: int) -> int:
    """The byte of the text at which its ``count`` answers begin, each with a space."""
    return length + 1 - count * (1 + WIDTH)


def last_place(ids: np.ndarray, count: int) -> np.ndarray:
    """``[B, count]``: the last place of each of the numbers 0 .. ``count`` - 1 in a row ``[B, n]``."""
    backwards = ids[:, ::-1]
    return np.stack([ids.shape[1] - 1 - np.argmax(backwards == each, axis=1) for each in range(count)], axis=1)


def guessed(tokens: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Answers ``[B, T]`` by the words that stand in a text from ``begins: [B, A]`` on."""
    size, length = tokens.shape
    found = np.zeros((size, length), dtype=np.int64)
    letters = (begins[:, :, None] + np.arange(WIDTH)).reshape(size, -1)
    found[:, is_answer(length, begins.shape[1])[1:]] = np.take_along_axis(tokens, letters, axis=1)
    return found
