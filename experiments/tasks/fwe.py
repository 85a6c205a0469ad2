"""Frequent words extraction: a text of coded words by Zipf's law, whose three most frequent ones are asked for.

Hsieh et al. 2024, "RULER", ``fwe``, in bytes: words of six random letters, the k-th most frequent of which comes
``s k^-alpha`` times, rounded down; the most frequent one is written ``...`` and is noise. They stand in random order,
with spaces between, and s is as large as T has room for. The text ends ``The 3 most frequent words are: tbnvoa ...``,
most frequent first. RULER's lengths are 4096 to 131072, and its alpha is 2.

RULER accepts the words in any order and searches for them in the generated text; here each is asked for after the true
ones before it, and accuracy is the share of whole words. RULER's number of words that may occur (T / 50) has no effect,
since the rarest come less than once long before; it is no option here. Spaces fill the text up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.coded_words import (
    SPACE,
    WIDTH,
    answered,
    answers_begin,
    coded_words,
    guessed,
    is_answer,
    last_place,
)
from experiments.tasks.generated import Draws, GeneratedConfig, WholeAnswersTask
from experiments.tasks.haystack import BYTES, reading
from experiments.tasks.task import Batch

ASKED = 3
QUESTION = b"\nThe 3 most frequent words are:"
NOISE = b"... "


@dataclass(frozen=True)
class FWEConfig(GeneratedConfig):
    """Options of :class:`FWE`; T counts bytes.

    Attributes:
        alpha: above 1; the larger, the more the most frequent words stand out.
    """

    length: int = 4096
    alpha: float = 2.0
    test_examples: int = 256

    def __post_init__(self):
        if not self.alpha > 1:
            raise ValueError(f"alpha must be above 1, got {self.alpha}")
        super().__post_init__()

    def room(self, length: int) -> int:
        """Bytes of the coded text."""
        return answers_begin(length, ASKED) - len(QUESTION)

    def counts(self, length: int) -> np.ndarray:
        """``[K]``: how often the noise and each word come, the most frequent first, as many as there is room for."""
        fits, too_many = 0, max(self.room(length), 0) // len(NOISE) + 1
        while too_many - fits > 1:
            tried = (fits + too_many) // 2
            counts = self._counts(tried)
            size = len(NOISE) * counts[0] + (WIDTH + 1) * counts[1:].sum()
            fits, too_many = (tried, too_many) if size <= self.room(length) else (fits, tried)
        return self._counts(fits)

    def _counts(self, most: int) -> np.ndarray:
        ranks = np.arange(1, int(most ** (1 / self.alpha)) + 2)
        counts = np.floor(most / ranks**self.alpha + 1e-9).astype(np.int64)  # Wherever a quotient is a whole number.
        return counts[(counts > 0) | (ranks == 1)]

    def check_length(self, length: int) -> None:
        counts = self.counts(length)
        asked = np.append(counts[1:], 0)[: ASKED + 1]
        if len(asked) < ASKED + 1 or not (np.diff(asked) < 0).all():
            raise ValueError(
                f"length ({length}) is too short: the {ASKED} most frequent words must each come more often than the"
                f" next, and alpha {self.alpha} makes them come {asked.tolist()} times"
            )


class FWE(WholeAnswersTask):
    Config = FWEConfig
    name = "fwe"
    tokens = "bytes"
    title = "Frequent words extraction"
    reading = (
        "A long text of coded words has few frequent and many rare ones, and the three most frequent are asked for;"
        " accuracy is the share of words named right. A model must count everything that it reads."
    )
    guesses = "any word of the text, at random"
    answer_tokens = WIDTH
    config: FWEConfig

    def __init__(self, config: FWEConfig):
        super().__init__(config, vocab_size=BYTES)

    def generate(self, draws: Draws, length: int) -> Batch:
        size, counts = draws.size, self.config.counts(length)
        listed = np.repeat(np.arange(len(counts)), counts)
        ids = listed[np.argsort(draws.uniforms("order", len(listed)), axis=1)]
        words = coded_words(draws, "words", len(counts) - 1)
        entries = np.full((size, len(counts), WIDTH + 1), SPACE, dtype=np.int64)
        entries[:, 0, : len(NOISE)] = np.frombuffer(NOISE, np.uint8)
        entries[:, 1:, :WIDTH] = words
        widths = np.where(ids == 0, len(NOISE), WIDTH + 1)
        kept = np.arange(WIDTH + 1) < widths[:, :, None]
        coded = np.take_along_axis(entries, ids[:, :, None], axis=1)[kept].reshape(size, -1)

        begin = answers_begin(length, ASKED)
        text = np.full((size, begin), SPACE, dtype=np.int64)
        text[:, : coded.shape[1]] = coded
        text[:, begin - len(QUESTION) :] = np.frombuffer(QUESTION, np.uint8)
        begins = np.cumsum(widths, axis=1) - widths
        last = np.take_along_axis(begins, last_place(ids, ASKED + 1)[:, 1:], axis=1)
        groups = {
            "gap": begin + (1 + WIDTH) * np.arange(ASKED) - last,
            "position": np.broadcast_to(1 + np.arange(ASKED), last.shape),
        }
        text = np.concatenate([text, answered(words[:, :ASKED])], axis=1)
        return reading(text, is_answer(length, ASKED), groups)

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        length = batch.tokens.shape[1]
        text = batch.tokens[:, : self.config.room(length)]
        before = np.append(np.full((len(text), 1), SPACE), text[:, :-1], axis=1)
        begins = np.nonzero((before == SPACE) & (text >= ord("a")))[1].reshape(len(text), -1)
        chosen = draws.integers("", ASKED, begins.shape[1])
        return guessed(batch.tokens, np.take_along_axis(begins, chosen, axis=1))
