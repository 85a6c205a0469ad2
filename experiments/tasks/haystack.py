"""Hides statements in a long text, for tasks that ask about them at its end: bytes, as ``[B, N]`` numbers."""

from __future__ import annotations

import numpy as np

from experiments.tasks.generated import Draws, placed
from experiments.tasks.task import IGNORED, Batch

BYTES = 256
LINE_END = ord("\n")
NOISE = b"The river is wide.\nThe road is long.\nThe night is cold.\nOn we walk.\nAnd then we rest.\n"
"""The lines that a meaningless haystack repeats, as RULER's does with sentences of its own."""


def noise(draws: Draws, length: int) -> np.ndarray:
    """``[B, length]``: :data:`NOISE` over and over, each row from another line on."""
    text = np.frombuffer(NOISE, np.uint8)
    lines = np.flatnonzero(np.roll(text, 1) == LINE_END)
    begins = lines[draws.integers("noise", 1, len(lines))]
    return text[(begins + np.arange(length)) % len(text)]


def plant(draws: Draws, haystack: np.ndarray, statements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Statements ``[B, S, n]`` before lines of a haystack ``[B, H]``, in their order: ``[B, H + S n]``.

    They fall anywhere and move to the next beginning of a line. The haystack's last byte becomes the end of its line.

    Returns:
        The text, and where each statement begins, ``[B, S]``.
    """
    size, count, width = statements.shape
    end = haystack.shape[1]
    haystack = np.where(np.arange(end) == end - 1, LINE_END, haystack)
    # For every place the next at which a line begins, or the end of the haystack.
    begins = np.where(haystack == LINE_END, np.arange(1, end + 1), end)
    begins = np.minimum.accumulate(np.append(begins, np.full((size, 1), end), axis=1)[:, ::-1], axis=1)[:, ::-1]
    wanted = np.sort(draws.integers("cuts", count, end + 1), axis=1)
    cuts = np.take_along_axis(begins, wanted, axis=1) + width * np.arange(count)
    places = (cuts[:, :, None] + np.arange(width)).reshape(size, -1)
    text = np.empty((size, end + count * width), dtype=np.int64)
    is_free = np.ones(text.shape, dtype=bool)
    np.put_along_axis(is_free, places, False, axis=1)
    text[is_free] = haystack.ravel()
    np.put_along_axis(text, places, statements.reshape(size, -1), axis=1)
    return text, cuts


def depths(begins: np.ndarray, width: int, length: int) -> np.ndarray:
    """Where statements of so many bytes lie in a text: 0 at its beginning, 1 at its end."""
    return begins / max(length - width, 1)


def distinct(draws: Draws, purpose: str, count: int, below: int) -> np.ndarray:
    """``[B, count]`` different numbers of 0 .. ``below`` - 1, any set and order as likely as any other.

    The i-th is drawn among ``below - i`` and then counted among those that are left.
    """
    fractions = draws.uniforms(purpose, count)
    taken = np.empty((draws.size, 0), dtype=np.int64)
    found = []
    for number in range(count):
        drawn = (fractions[:, number] * (below - number)).astype(np.int64)
        passed = (taken - np.arange(number) <= drawn[:, None]).sum(axis=1)
        found.append(drawn + passed)
        taken = np.sort(np.append(taken, found[-1][:, None], axis=1), axis=1)
    return np.stack(found, axis=1)


def written(numbers: np.ndarray, width: int, alphabet: bytes) -> np.ndarray:
    """``[..., width]``: numbers in the digits of an alphabet, the highest first."""
    powers = len(alphabet) ** np.arange(width - 1, -1, -1)
    return np.frombuffer(alphabet, np.uint8)[numbers[..., None] // powers % len(alphabet)]


def sentence(*parts: bytes | np.ndarray) -> np.ndarray:
    """``[B, S, n]``: fixed text and ``[B, S, m]`` pieces, one after the other."""
    shape = next(part.shape[:2] for part in parts if isinstance(part, np.ndarray))
    pieces = [np.broadcast_to(np.frombuffer(part, np.uint8), (*shape, len(part))) if isinstance(part, bytes) else part
              for part in parts]  # fmt: skip
    return np.concatenate(pieces, axis=2)


def reading(text: np.ndarray, asked: np.ndarray, groups: dict[str, np.ndarray]) -> Batch:
    """A text ``[B, T + 1]`` to be predicted byte by byte, of which the bytes ``asked: [T + 1]`` count.

    ``groups`` are numbers ``[B, A]`` of the A answers, all of which have equally many bytes.
    """
    targets = np.where(asked, text, IGNORED)[:, 1:].astype(np.int64)
    places = np.broadcast_to(np.flatnonzero(asked) - 1, (len(text), int(asked.sum())))
    spread = {name: np.repeat(each, places.shape[1] // each.shape[1], axis=1) for name, each in groups.items()}
    return Batch(
        text[:, :-1].astype(np.int64),
        targets,
        groups={name: placed(targets, places, each) for name, each in spread.items()},
    )
