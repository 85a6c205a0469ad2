"""Needles in a haystack: statements of numbers hidden in a long meaningless text, and asked for at its end.

Hsieh et al. 2024, "RULER", in bytes: ``The number of qhzwe is 4071.`` appears K times among the lines of the haystack,
each time with another name. The text ends with Q of these statements again, in another order, and their digits are to
be predicted. Haystacks repeat a few lines; ``needle_text`` takes source code instead.

RULER asks in other words and searches for the number anywhere in the generated text; here every digit counts, after the
true digits before it, and ``sequence_accuracy`` counts texts without any wrong digit. Statements fall uniformly over
the haystack, at any length, and move to the next beginning of a line; so one can train short and test long.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least
from experiments.tasks.haystack import BYTES, depths, distinct, noise, plant, reading, sentence, written
from experiments.tasks.task import Batch

LETTERS, DIGITS = b"abcdefghijklmnopqrstuvwxyz", b"0123456789"
NAME_LETTERS = 5
BEGINNING, MIDDLE, END = b"The number of ", b" is ", b".\n"


@dataclass(frozen=True)
class NeedleConfig(GeneratedConfig):
    """Options of :class:`Needle`; T counts bytes.

    Attributes:
        needles: K, how many statements are hidden.
        questions: Q, how many of them are asked about.
        digits: of each number.
    """

    length: int = 512
    needles: int = 4
    questions: int = 2
    digits: int = 4
    test_examples: int = 256

    def __post_init__(self):
        at_least(self, 1, "needles", "questions", "digits")
        if self.questions > self.needles:
            raise ValueError(f"questions must be at most needles ({self.needles}), got {self.questions}")
        if self.digits > 15:
            raise ValueError(f"digits must be at most 15, got {self.digits}")
        super().__post_init__()

    @property
    def statement(self) -> int:
        """Bytes of a statement."""
        return len(BEGINNING) + NAME_LETTERS + len(MIDDLE) + self.digits + len(END)

    def hay(self, length: int) -> int:
        """Bytes of the haystack without its statements: the last one ends with its digits, which is predicted last."""
        return length + 1 + len(END) - (self.needles + self.questions) * self.statement

    def check_length(self, length: int) -> None:
        if self.hay(length) < 0:
            raise ValueError(
                f"length ({length}) must be at least {length - self.hay(length)}: {self.needles} needles and"
                f" {self.questions} questions of {self.statement} bytes each"
            )


class Needle(GeneratedTask):
    Config = NeedleConfig
    name = "needle"
    tokens = "bytes"
    title = "Needles in a haystack"
    reading = (
        "Numbers are stated somewhere in a long text and asked for at its end; accuracy is the share of digits that are"
        " right. A model must know what to keep when it comes by, and keep it over all that follows."
    )
    guesses = "any digit, at random"
    config: NeedleConfig

    def __init__(self, config: NeedleConfig):
        super().__init__(config, vocab_size=BYTES)

    def haystack(self, draws: Draws, length: int) -> np.ndarray:
        """``[B, length]`` bytes."""
        return noise(draws, length)

    def generate(self, draws: Draws, length: int) -> Batch:
        config = self.config
        names = written(distinct(draws, "names", config.needles, 26**NAME_LETTERS), NAME_LETTERS, LETTERS)
        numbers = draws.integers("numbers", config.needles, 10**config.digits)
        statements = sentence(BEGINNING, names, MIDDLE, written(numbers, config.digits, DIGITS), END)
        text, begins = plant(draws, self.haystack(draws, config.hay(length)), statements)
        chosen = distinct(draws, "questions", config.questions, config.needles)
        questions = np.take_along_axis(statements, chosen[:, :, None], axis=1)
        shown, end = np.take_along_axis(begins, chosen, axis=1), text.shape[1]
        gap = end + config.statement * np.arange(config.questions) - shown - 1
        groups = {"depth": depths(shown, config.statement, end), "gap": gap}
        text = np.concatenate([text, questions.reshape(draws.size, -1)], axis=1)[:, : length + 1]
        return reading(text, self.answers(length), groups)

    def answers(self, length: int) -> np.ndarray:
        """``[T + 1]``: whether a byte of the text is a digit that is asked for."""
        last = len(END) + np.arange(self.config.digits)
        ends = length + 1 + len(END) - self.config.statement * np.arange(self.config.questions)
        asked = np.zeros(length + 1, dtype=bool)
        asked[(ends[:, None] - 1 - last).ravel()] = True
        return asked

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return DIGITS[0] + draws.integers("", batch.targets.shape[1], 10)
