"""Copying a string: ``$ string | string .`` over an alphabet, the second one to be predicted letter by letter.

Jelassi et al. 2024, "Repeat After Me: Transformers are Better than State Space Models at Copying". Training strings
have any number of letters up to the longest that fits, and blanks after them; validation and tests have the longest, at
their own length. The true letters before are given when one is predicted; ``sequence_accuracy`` counts strings without
a wrong letter, which is what greedy decoding gets right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least
from experiments.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class CopyingConfig(GeneratedConfig):
    """Options of :class:`Copying`; T = 2n + 2 fits strings of up to n letters.

    Attributes:
        letters: how many there are.
        shortest: letters of the shortest training string.
    """

    length: int = 64
    letters: int = 26
    shortest: int = 1

    def __post_init__(self):
        at_least(self, 1, "letters", "shortest")
        super().__post_init__()

    def check_length(self, length: int) -> None:
        if length % 2 or longest_string(length) < self.shortest:
            raise ValueError(
                f"length ({length}) must be even and at least {2 * self.shortest + 2}, for strings of"
                f" shortest = {self.shortest} letters twice"
            )


class Copying(GeneratedTask):
    Config = CopyingConfig
    name = "copying"
    title = "Copying a string"
    reading = (
        "A string is read and then repeated; accuracy is the share of letters repeated right, after the right ones"
        " before. A fixed state holds so many letters and no more, attention looks them up."
    )
    guesses = "any letter, at random"
    config: CopyingConfig

    def __init__(self, config: CopyingConfig):
        super().__init__(config, config.letters + 4)
        self.begin, self.again, self.end, self.blank = range(config.letters, config.letters + 4)

    def generate(self, draws: Draws, length: int) -> Batch:
        longest = longest_string(length)
        string = draws.integers("string", longest, self.config.letters)
        count = np.full((draws.size, 1), longest)
        if draws.split == "train":
            count = self.config.shortest + draws.integers("count", 1, longest - self.config.shortest + 1)
        place = np.arange(length)
        once, twice = place - 1, place - count - 2  # Which letter stands here: the first time, the second time.
        letters = np.take_along_axis(string, np.where(twice >= 0, twice, once).clip(0, longest - 1), axis=1)
        tokens = np.where(twice < count, letters, self.blank)
        tokens[:, 0] = self.begin
        np.put_along_axis(tokens, count + 1, self.again, axis=1)
        following = np.take_along_axis(string, (twice + 1).clip(0, longest - 1), axis=1)
        targets = np.where((twice >= -1) & (twice < count - 1), following, IGNORED)
        np.put_along_axis(targets, 2 * count + 1, self.end, axis=1)
        # Letter 1 is asked for at the second mark.
        return Batch(tokens, targets, tokens != self.blank, {"position": np.maximum(twice + 2, 0)})

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return draws.integers("", batch.targets.shape[1], self.config.letters)


def longest_string(length: int) -> int:
    """Letters of a string that fits twice, with the marks before each."""
    return (length - 2) // 2
