"""Recall of keys that are given new values: the newest one is to be recalled, and the old one forgotten.

After ``forgetting_mqar``, a later addition to the generators of Arora et al. 2023, "Zoology". A sequence begins with K
pairs as in ``mqar``; U of the keys, at random, then come again with other values; later every key is asked for once, at
gaps by the same power law. Whoever recalls the first value and never overwrites it is right in (K - U) / K of all
answers; ``updated`` in the results tells those apart.

In zoology a new value may be another key's old one, and the filler is not seeded; here all K + U values differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedTask, at_least, placed
from experiments.tasks.haystack import distinct
from experiments.tasks.mqar import MQARConfig, power_law
from experiments.tasks.task import IGNORED, Batch, Metric


@dataclass(frozen=True)
class ForgettingMQARConfig(MQARConfig):
    """Options of :class:`ForgettingMQAR`.

    Attributes:
        pairs: K; T is even and at least 4K + 2U.
        updates: U, how many keys are given a new value, at most K.
    """

    pairs: int = 8
    updates: int = 4

    def __post_init__(self):
        at_least(self, 0, "updates")
        if self.updates > self.pairs:
            raise ValueError(f"updates must be at most pairs ({self.pairs}), got {self.updates}")
        super().__post_init__()
        if self.pairs + self.updates > self.vocab_size // 2:
            raise ValueError(
                f"vocab_size ({self.vocab_size}) must be at least twice pairs + updates ({self.pairs + self.updates}):"
                " all values differ"
            )

    def check_length(self, length: int) -> None:
        least = 4 * self.pairs + 2 * self.updates
        if length % 2 or length < least:
            raise ValueError(
                f"length ({length}) must be even and at least {least}: two tokens for each of {self.pairs} pairs,"
                f" {self.updates} updates and {self.pairs} questions"
            )


class ForgettingMQAR(GeneratedTask):
    Config = ForgettingMQARConfig
    name = "forgetting_mqar"
    title = "Recall of the newest value"
    reading = (
        "Keys are shown with values, and some of them again with new ones; accuracy is the share of keys whose newest"
        " value the model recalls. A state that only adds keeps both values and cannot tell which is newer."
    )
    metric = Metric("accuracy", "Recall accuracy", "", higher_is_better=True)
    config: ForgettingMQARConfig

    def __init__(self, config: ForgettingMQARConfig):
        super().__init__(config, config.vocab_size)

    def generate(self, draws: Draws, length: int) -> Batch:
        config, half, size = self.config, self.config.vocab_size // 2, draws.size
        pairs, shown = config.pairs, config.pairs + config.updates
        keys = 1 + distinct(draws, "keys", pairs, half - 1)
        values = half + distinct(draws, "values", shown, half)
        # Which pair each statement is of: all once, and then the updated ones in any order.
        first = np.broadcast_to(np.arange(pairs), (size, pairs))
        updated = np.argsort(draws.uniforms("updated", pairs), axis=1)[:, : config.updates]
        stated = np.concatenate([first, updated], axis=1)
        newest = first.copy()
        np.put_along_axis(newest, updated, np.broadcast_to(np.arange(pairs, shown), updated.shape), axis=1)

        slots = power_law(draws.uniforms("gaps", (length - 2 * shown) // 2), pairs, config.power)
        tokens = np.zeros((size, length), dtype=np.int64)
        if config.filler == "random":
            tokens = draws.integers("filler", length, config.vocab_size)
        tokens[:, 0 : 2 * shown : 2] = np.take_along_axis(keys, stated, axis=1)
        tokens[:, 1 : 2 * shown : 2] = values
        targets = np.full((size, length), IGNORED, dtype=np.int64)
        asked = 2 * shown + 2 * slots
        np.put_along_axis(tokens, asked, keys, axis=1)
        np.put_along_axis(targets, asked, np.take_along_axis(values, newest, axis=1), axis=1)
        groups = {"gap": asked - 2 * newest - 1, "updated": (newest >= pairs).astype(np.int64)}
        return Batch(tokens, targets, groups={name: placed(targets, asked, each) for name, each in groups.items()})

    def chance(self, split: str = "test") -> tuple[float, str]:
        seen = self.config.pairs + self.config.updates
        return 1 / seen, f"guessing among the {seen} values seen"
