"""Looking up an n-gram: a string, some letters of it, and what follows them there is to be predicted.

Jelassi et al. 2024, "Repeat After Me: Transformers are Better than State Space Models at Copying": as there, the n
letters come after the string, ``$ string | letters ...``, so that all of it must be kept, or before it, ``$ letters |
string | ...``, so that a model can watch for them. Where the letters appear more than once in the string, the first
place counts: every question has one answer. The true letters before are given when one is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least, placed
from experiments.tasks.task import IGNORED, Batch

ASKED = ("after", "before")


@dataclass(frozen=True)
class NgramLookupConfig(GeneratedConfig):
    """Options of :class:`NgramLookup`; T counts the string, the n letters, the marks, and all but the last answer.

    Attributes:
        letters: how many there are.
        ngram: n.
        answer: how many letters are to be predicted.
        asked: whether the n letters come ``after`` the string or ``before`` it.
    """

    length: int = 64
    letters: int = 26
    ngram: int = 3
    answer: int = 4
    asked: str = "after"

    def __post_init__(self):
        at_least(self, 1, "letters", "ngram", "answer")
        if self.asked not in ASKED:
            raise ValueError(f"asked must be 'after' or 'before', got {self.asked!r}")
        if self.letters**self.ngram > 2**62:
            raise ValueError(f"ngram ({self.ngram}) is too long for {self.letters} letters")
        super().__post_init__()

    def string(self, length: int) -> int:
        """Letters of the string."""
        return length - self.ngram - self.answer - (1 if self.asked == "after" else 2)

    def check_length(self, length: int) -> None:
        missing = self.ngram + self.answer - self.string(length)
        if missing > 0:
            raise ValueError(
                f"length ({length}) must be at least {length + missing}, for a string of"
                f" ngram + answer = {self.ngram + self.answer} letters or more"
            )


class NgramLookup(GeneratedTask):
    Config = NgramLookupConfig
    name = "ngram_lookup"
    title = "Looking up an n-gram"
    reading = (
        "Some letters of a string are named, and what follows them there is asked for; accuracy is the share of letters"
        " that are right. Asked after the string, it takes all of it in memory; asked before, a watch for the right"
        " place."
    )
    guesses = "any letter, at random"
    config: NgramLookupConfig

    def __init__(self, config: NgramLookupConfig):
        super().__init__(config, config.letters + 2)

    def generate(self, draws: Draws, length: int) -> Batch:
        config = self.config
        string = draws.integers("string", config.string(length), config.letters)
        place = first_places(string, draws.integers("place", 1, string.shape[1] - config.ngram - config.answer + 1),
                             config.ngram, config.letters)  # fmt: skip
        ngram = np.take_along_axis(string, place + np.arange(config.ngram), axis=1)
        answer = np.take_along_axis(string, place + config.ngram + np.arange(config.answer), axis=1)
        begin, mark = (np.full((draws.size, 1), config.letters + number) for number in (0, 1))
        asked = [string, mark, ngram] if config.asked == "after" else [ngram, mark, string, mark]
        tokens = np.concatenate([begin, *asked, answer[:, :-1]], axis=1)
        targets = np.full_like(tokens, IGNORED)
        targets[:, -config.answer :] = answer
        before = 1 if config.asked == "after" else config.ngram + 2  # Tokens before the string.
        shown = before + place + config.ngram + np.arange(config.answer)
        at = np.broadcast_to(np.arange(length - config.answer, length), shown.shape)
        return Batch(tokens, targets, groups={"gap": placed(targets, at, at - shown)})

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return draws.integers("", batch.targets.shape[1], self.config.letters)


def first_places(string: np.ndarray, place: np.ndarray, ngram: int, letters: int) -> np.ndarray:
    """``[B, 1]``: the first place in a string of the n-gram at ``place``."""
    codes = np.zeros_like(string[:, ngram - 1 :])
    for number in range(ngram):
        codes = codes * letters + string[:, number : number + codes.shape[1]]
    return np.argmax(codes == np.take_along_axis(codes, place, axis=1), axis=1)[:, None]
