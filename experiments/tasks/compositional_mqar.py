"""Recall by keys of two parts: neither part alone says which value is asked for.

After ``compositional_mqar``, a later addition to the generators of Arora et al. 2023, "Zoology". Of m first and m
second parts all K = m^2 combinations have a value each; a sequence begins with the triples ``first second value``, in
random order, and later asks for every combination once: at the second part the value is to be predicted. Whoever reads
one part alone is right in 1 / m of all answers. Questions are at slots g = 1 .. (T - 3K) / 3 after the triples, drawn
without replacement with probability proportional to g^(a - 1). First parts are from [1, V/3), second ones from
[V/3, 2V/3), values from [2V/3, V) and distinct; other positions are as in ``mqar``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least, placed
from experiments.tasks.haystack import distinct
from experiments.tasks.mqar import power_law
from experiments.tasks.task import IGNORED, Batch, Metric


@dataclass(frozen=True)
class CompositionalMQARConfig(GeneratedConfig):
    """Options of :class:`CompositionalMQAR`.

    Attributes:
        vocab_size: V, of which a third are first parts, a third second parts, and the rest values.
        pairs: K, a square number; T is at least 6K.
        power: a; the smaller, the sooner a key is asked for again.
        filler: ``blank`` or ``random``.
    """

    vocab_size: int = 8192
    pairs: int = 4
    power: float = 0.01
    filler: str = "blank"

    def __post_init__(self):
        at_least(self, 1, "pairs")
        super().__post_init__()
        if self.parts**2 != self.pairs:
            raise ValueError(f"pairs must be a square number, such as 4, 9 or 16; got {self.pairs}")
        first, second, _ = (len(tokens) for tokens in self.tokens)
        if min(first, second) < self.parts or self.vocab_size - 2 * (self.vocab_size // 3) < self.pairs:
            raise ValueError(
                f"vocab_size ({self.vocab_size}) is too small for {self.parts} parts and {self.pairs} values, a third"
                " of it for each kind"
            )
        if not self.power > 0:
            raise ValueError(f"power must be positive, got {self.power}")
        if self.filler not in ("blank", "random"):
            raise ValueError(f"filler must be 'blank' or 'random', got {self.filler!r}")

    @property
    def parts(self) -> int:
        """m, first parts of a sequence, and as many second ones."""
        return math.isqrt(self.pairs)

    @property
    def tokens(self) -> tuple[range, range, range]:
        """First parts, second parts, and values."""
        third = self.vocab_size // 3
        return range(1, third), range(third, 2 * third), range(2 * third, self.vocab_size)

    def check_length(self, length: int) -> None:
        if length < 6 * self.pairs:
            raise ValueError(
                f"length ({length}) must be at least 6 * pairs (pairs is {self.pairs}): three tokens a pair, and as"
                " much room to ask for each"
            )


class CompositionalMQAR(GeneratedTask):
    Config = CompositionalMQARConfig
    name = "compositional_mqar"
    title = "Recall by keys of two parts"
    reading = (
        "Pairs of tokens are shown with their values and later asked for; accuracy is the share of values that the"
        " model recalls. Each token is part of several keys, so that both must be put together before the look-up."
    )
    metric = Metric("accuracy", "Recall accuracy", "", higher_is_better=True)
    config: CompositionalMQARConfig

    def __init__(self, config: CompositionalMQARConfig):
        super().__init__(config, config.vocab_size)

    def generate(self, draws: Draws, length: int) -> Batch:
        config, pairs, size = self.config, self.config.pairs, draws.size
        firsts, seconds, values = (
            tokens.start + distinct(draws, purpose, count, len(tokens))
            for purpose, count, tokens in zip(
                ("first", "second", "values"), (config.parts, config.parts, pairs), config.tokens, strict=True
            )
        )
        cells = np.argsort(draws.uniforms("order", pairs), axis=1)
        first = np.take_along_axis(firsts, cells // config.parts, axis=1)
        second = np.take_along_axis(seconds, cells % config.parts, axis=1)
        slots = power_law(draws.uniforms("gaps", (length - 3 * pairs) // 3), pairs, config.power)

        tokens = np.zeros((size, length), dtype=np.int64)
        if config.filler == "random":
            tokens = draws.integers("filler", length, config.vocab_size)
        for place, part in enumerate((first, second, values)):
            tokens[:, place : 3 * pairs : 3] = part
        targets = np.full((size, length), IGNORED, dtype=np.int64)
        asked = 3 * pairs + 3 * slots + 1
        np.put_along_axis(tokens, asked - 1, first, axis=1)
        np.put_along_axis(tokens, asked, second, axis=1)
        np.put_along_axis(targets, asked, values, axis=1)
        number = np.broadcast_to(np.arange(pairs), asked.shape)
        groups = {"gap": placed(targets, asked, asked - 3 * number - 2), "pair": placed(targets, asked, number + 1)}
        return Batch(tokens, targets, groups=groups)

    def chance(self, split: str = "test") -> tuple[float, str]:
        return 1 / self.config.pairs, f"guessing among the {self.config.pairs} values seen"
