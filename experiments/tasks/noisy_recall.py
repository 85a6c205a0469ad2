"""Recall in context, among noise: keys with their values come again and again, and each time but the first are asked.

Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD): half of V tokens are keys and half
values; in every sequence each key has a value of its own, drawn anew. The sequence is made of pairs ``key value``, a
key as likely as any other, and of pairs of noise tokens in place of a share of them. ``noise: 0`` is plain recall.

MAD asks about one key per sequence by default, trains on every token and scores by the mean over the classes
of answers. Here every key that has been shown before is asked about, only these answers are trained, and accuracy is
the share of all answers that are right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least, last_shown
from experiments.tasks.task import IGNORED, Batch, Metric


@dataclass(frozen=True)
class NoisyRecallConfig(GeneratedConfig):
    """Options of :class:`NoisyRecall`; T counts keys, values and noise, and is even.

    Attributes:
        vocab_size: V, even: keys and values.
        noise: share of the pairs that are noise.
        noise_vocab: how many noise tokens there are besides.
    """

    length: int = 128
    vocab_size: int = 16
    noise: float = 0.2
    noise_vocab: int = 16

    def __post_init__(self):
        if self.vocab_size % 2 or self.vocab_size < 2:
            raise ValueError(f"vocab_size must be even, half keys and half values; got {self.vocab_size}")
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be at least 0 and below 1, got {self.noise}")
        at_least(self, 1 if self.noise else 0, "noise_vocab")
        super().__post_init__()

    def check_length(self, length: int) -> None:
        if length % 2 or length <= self.vocab_size:
            raise ValueError(
                f"length ({length}) must be even and above vocab_size ({self.vocab_size}): more pairs than keys"
            )


class NoisyRecall(GeneratedTask):
    Config = NoisyRecallConfig
    name = "noisy_recall"
    title = "Recall among noise"
    reading = (
        "Keys with their values come again and again, with noise between; accuracy is the share of values recalled of"
        " keys shown before. Noise must be passed over without disturbing what is kept."
    )
    metric = Metric("accuracy", "Recall accuracy", "", higher_is_better=True)
    guesses = "the last value shown"
    config: NoisyRecallConfig

    def __init__(self, config: NoisyRecallConfig):
        super().__init__(config, config.vocab_size + (config.noise_vocab if config.noise else 0))

    def generate(self, draws: Draws, length: int) -> Batch:
        half, pairs = self.config.vocab_size // 2, length // 2
        keys = draws.integers("keys", pairs, half)
        book = half + draws.integers("values", half, half)
        values = np.take_along_axis(book, keys, axis=1)
        is_noise = draws.uniforms("noisy", pairs) < self.config.noise
        shown = (keys[:, :, None] == np.arange(half)) & ~is_noise[:, :, None]
        newest = last_shown(shown)
        previous = np.take_along_axis(newest, keys[:, :, None], axis=2)[:, :, 0]
        before = previous >= 0

        tokens = np.stack([keys, values], axis=2)
        if self.config.noise:
            noise = 2 * half + draws.integers("noise", length, self.config.noise_vocab)
            tokens = np.where(is_noise[:, :, None], noise.reshape(tokens.shape), tokens)
        targets = np.full_like(tokens, IGNORED)
        targets[:, :, 0] = np.where(before & ~is_noise, values, IGNORED)
        groups = {"gap": 2 * (np.arange(pairs) - previous) - 1, "pairs": (newest >= 0).sum(axis=2)}
        groups = {name: np.repeat(each, 2, axis=1) for name, each in groups.items()}
        return Batch(tokens.reshape(-1, length), targets.reshape(-1, length), groups=groups)

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        size, half = self.config.vocab_size, self.config.vocab_size // 2
        is_value = (batch.tokens >= half) & (batch.tokens < size)
        last = np.maximum.accumulate(np.where(is_value, np.arange(batch.tokens.shape[1]), 0), axis=1)
        return np.take_along_axis(batch.tokens, last, axis=1)
