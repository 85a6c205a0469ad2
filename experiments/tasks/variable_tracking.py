"""Variable tracking: chains of assignments hidden in a long text, and all names that hold a value asked for at its end.

Hsieh et al. 2024, "RULER", in bytes. Each of C chains begins with ``VAR ABCDE = 12345`` and has H links more, ``VAR
FGHIJ = ABCDE``, in this order but with the other chains and a meaningless haystack between. The text ends ``Which are
12345? ABCDE FGHIJ ...``, and the letters of the H + 1 names are to be predicted.

In RULER's generator names may come twice, two chains may have the same value, and an answer is searched for anywhere in
the generated text. Here names and values differ within a text, and every letter counts, after the true ones before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least
from experiments.tasks.haystack import BYTES, depths, distinct, noise, plant, reading, sentence, written
from experiments.tasks.task import Batch

LETTERS, DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"0123456789"
WIDTH = 5
"""Letters of a name and digits of a value: all statements have the same number of bytes."""

BEGINNING, MIDDLE, END = b"VAR ", b" = ", b"\n"
STATEMENT = len(BEGINNING) + len(MIDDLE) + len(END) + 2 * WIDTH
QUESTION, ASKED = b"Which are ", b"?"


@dataclass(frozen=True)
class VariableTrackingConfig(GeneratedConfig):
    """Options of :class:`VariableTracking`; T counts bytes.

    Attributes:
        chains: C, one of which is asked about.
        hops: H, how often a value is handed on.
    """

    length: int = 512
    chains: int = 2
    hops: int = 2
    test_examples: int = 256

    def __post_init__(self):
        at_least(self, 1, "chains")
        at_least(self, 0, "hops")
        super().__post_init__()

    @property
    def names(self) -> int:
        """Names of a chain."""
        return self.hops + 1

    @property
    def question(self) -> int:
        """Bytes of the question and its answer: a space and a name for each."""
        return len(QUESTION) + WIDTH + len(ASKED) + self.names * (1 + WIDTH)

    def hay(self, length: int) -> int:
        """Bytes of the haystack without its statements."""
        return length + 1 - self.question - self.chains * self.names * STATEMENT

    def check_length(self, length: int) -> None:
        if self.hay(length) < 0:
            raise ValueError(
                f"length ({length}) must be at least {length - self.hay(length)}: {self.chains * self.names}"
                f" statements of {STATEMENT} bytes, and {self.question} for question and answer"
            )


class VariableTracking(GeneratedTask):
    Config = VariableTrackingConfig
    name = "variable_tracking"
    tokens = "bytes"
    title = "Variable tracking"
    reading = (
        "Values are handed on from name to name, somewhere in a long text, and all names of one value are asked for;"
        " accuracy is the share of letters that are right. Every hop is a look-up that needs the one before."
    )
    guesses = "any letter, at random"
    config: VariableTrackingConfig

    def __init__(self, config: VariableTrackingConfig):
        super().__init__(config, vocab_size=BYTES)

    def generate(self, draws: Draws, length: int) -> Batch:
        chains, count = self.config.chains, self.config.names
        names = written(distinct(draws, "names", chains * count, 26**WIDTH), WIDTH, LETTERS)
        values = written(distinct(draws, "values", chains, 10**WIDTH), WIDTH, DIGITS)
        names = names.reshape(-1, chains, count, WIDTH)
        sources = np.concatenate([values[:, :, None], names[:, :, :-1]], axis=2)
        statements = sentence(BEGINNING, _merged(names), MIDDLE, _merged(sources), END)
        # A random order of all statements in which those of a chain keep theirs.
        ranks = np.argsort(draws.uniforms("order", chains * count), axis=1).reshape(-1, chains, count)
        order = np.argsort(np.sort(ranks, axis=2).reshape(-1, chains * count), axis=1)
        text, begins = plant(
            draws,
            noise(draws, self.config.hay(length)),
            np.take_along_axis(statements, order[:, :, None], axis=1),
        )
        shown = np.take_along_axis(begins, np.sort(ranks[:, 0], axis=1), axis=1)
        asked = length + 1 - self.config.names * (1 + WIDTH) + (1 + WIDTH) * np.arange(count)
        groups = {
            "hops": np.broadcast_to(np.arange(count), shown.shape),
            "depth": depths(shown, STATEMENT, text.shape[1]),
            "gap": asked - shown - len(BEGINNING),
        }
        end = sentence(QUESTION, values[:, :1], ASKED)[:, 0]
        spaces = np.full((draws.size, count, 1), ord(" "))
        answer = np.concatenate([spaces, names[:, 0]], axis=2).reshape(draws.size, -1)
        return reading(np.concatenate([text, end, answer], axis=1), self.answers(length), groups)

    def answers(self, length: int) -> np.ndarray:
        """``[T + 1]``: whether a byte of the text is a letter that is asked for."""
        place = np.arange(length + 1) - (length + 1 - self.config.names * (1 + WIDTH))
        return (place >= 0) & (place % (1 + WIDTH) != 0)

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return LETTERS[0] + draws.integers("", batch.targets.shape[1], 26)


def _merged(pieces: np.ndarray) -> np.ndarray:
    """``[B, C, n, w]`` as ``[B, C n, w]``."""
    return pieces.reshape(len(pieces), -1, pieces.shape[-1])
