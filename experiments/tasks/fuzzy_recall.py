"""Recall in context of motifs: keys and values are one to three tokens long, and come again and again.

Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD). Every sequence has K keys of its own,
each with a value; a sequence is made of them in random order, ``key = value key = value ...``. From its second
appearance on the tokens of a key's value are asked for.

MAD has no token between key and value, so that where one key begins another nobody can know whether it is over; it
draws keys anew each time from hundreds, so that few come again; and its test has the longest keys alone. Here ``=``
is between, and training, validation and test are drawn alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least, last_shown
from experiments.tasks.haystack import distinct
from experiments.tasks.task import IGNORED, Batch, Metric


@dataclass(frozen=True)
class FuzzyRecallConfig(GeneratedConfig):
    """Options of :class:`FuzzyRecall`; T counts keys, values and the tokens between.

    Attributes:
        vocab_size: V, even: half make up keys and half values.
        keys: K, in a sequence, at most V / 2.
        motif: the most tokens of a key and of a value; any number up to it is as likely.
    """

    length: int = 128
    vocab_size: int = 16
    keys: int = 8
    motif: int = 3

    def __post_init__(self):
        at_least(self, 1, "keys", "motif")
        if self.vocab_size % 2 or self.keys > self.vocab_size // 2:
            raise ValueError(f"vocab_size ({self.vocab_size}) must be even and at least twice keys ({self.keys})")
        if (self.vocab_size // 2) ** self.motif > 2**53:
            raise ValueError(f"motif ({self.motif}) is too long for vocab_size {self.vocab_size}")
        super().__post_init__()

    def check_length(self, length: int) -> None:
        least = (self.keys + 1) * (2 * self.motif + 1)
        if length < least:
            raise ValueError(f"length ({length}) must be at least {least}, so that more pairs fit in than keys")


class FuzzyRecall(GeneratedTask):
    Config = FuzzyRecallConfig
    name = "fuzzy_recall"
    title = "Recall of motifs"
    reading = (
        "Keys and values of one to three tokens come again and again; accuracy is the share of the values' tokens"
        " recalled of keys shown before. A model must put neighbouring tokens together before it can look them up."
    )
    metric = Metric("accuracy", "Recall accuracy", "", higher_is_better=True)
    guesses = "any token of values, at random"
    config: FuzzyRecallConfig

    def __init__(self, config: FuzzyRecallConfig):
        super().__init__(config, config.vocab_size + 1)

    def generate(self, draws: Draws, length: int) -> Batch:
        config, half = self.config, self.config.vocab_size // 2
        keys, key_there = self._motifs(draws, "keys")
        values, value_there = self._motifs(draws, "values")
        between = np.full((draws.size, config.keys, 1), config.vocab_size)
        entries = np.concatenate([keys, between, half + values], axis=2)
        there = np.concatenate([key_there, np.ones_like(between, dtype=bool), value_there], axis=2)
        answers = np.full_like(entries, IGNORED)
        answers[:, :, config.motif : -1] = np.where(value_there, half + values, IGNORED)

        order = draws.integers("order", -(-length // 3), config.keys)
        shown = order[:, :, None] == np.arange(config.keys)
        newest = last_shown(shown)
        previous = np.take_along_axis(newest, order[:, :, None], axis=2)
        again = previous >= 0
        tokens, targets, kept = (
            np.take_along_axis(each, order[:, :, None], axis=1) for each in (entries, answers, there)
        )
        sizes = kept.sum(axis=2)
        begins = np.cumsum(sizes, axis=1) - sizes
        gap = begins - np.take_along_axis(begins, previous[:, :, 0].clip(0), axis=1) - 1
        spread = (np.broadcast_to(each[:, :, None], kept.shape) for each in (gap, (newest >= 0).sum(axis=2)))
        found = _joined(kept, length, tokens, np.where(again, targets, IGNORED), *spread)
        return Batch(found[0], found[1], groups={"gap": found[2], "pairs": found[3]})

    def _motifs(self, draws: Draws, purpose: str) -> tuple[np.ndarray, np.ndarray]:
        """``[B, K, motif]``: K different motifs, and which of their places are taken."""
        config, half = self.config, self.config.vocab_size // 2
        lengths = 1 + draws.integers(f"{purpose}/lengths", config.keys, config.motif)
        digits = np.zeros((draws.size, config.keys, config.motif), dtype=np.int64)
        for length in range(1, config.motif + 1):
            numbers = distinct(draws, f"{purpose}/{length}", config.keys, half**length)
            drawn = numbers[:, :, None] // half ** np.arange(config.motif) % half
            digits = np.where((lengths == length)[:, :, None], drawn, digits)
        return digits, np.arange(config.motif) < lengths[:, :, None]

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        half = self.config.vocab_size // 2
        return half + draws.integers("", batch.targets.shape[1], half)


def _joined(kept: np.ndarray, length: int, *arrays: np.ndarray) -> list[np.ndarray]:
    """``[B, length]``: of ``[B, N, n]`` arrays the entries that are kept, without gaps."""
    rows, flat = len(kept), kept.reshape(len(kept), -1)
    places = np.cumsum(flat, axis=1) - 1
    wanted = flat & (places < length)
    assert (wanted.sum(axis=1) == length).all()
    return [array.reshape(rows, -1)[wanted].reshape(rows, length) for array in arrays]
