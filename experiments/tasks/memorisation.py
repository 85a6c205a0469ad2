"""Memorisation: learn by heart which value belongs to each key, the same in all sequences.

Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD): nothing in a sequence gives the
values; ``key ? key ? ...`` asks for them at every ``?``, and only weights can know. Keys and values are matched once
for all, by ``map_seed``, whatever the seed of a run. Every key may come in training, validation and test, whose
sequences differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least, smallest
from experiments.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class MemorisationConfig(GeneratedConfig):
    """Options of :class:`Memorisation`; T is even: a key and a question in turn.

    Attributes:
        keys: K, and as many values.
        map_seed: which value belongs to which key.
    """

    length: int = 32
    keys: int = 127
    map_seed: int = 0

    def __post_init__(self):
        at_least(self, 2, "keys")
        super().__post_init__()

    def check_length(self, length: int) -> None:
        if length % 2 or length < 2:
            raise ValueError(f"length must be even, a key and a question in turn; got {length}")


class Memorisation(GeneratedTask):
    Config = MemorisationConfig
    name = "memorisation"
    title = "Memorisation"
    reading = (
        "Each key has a value, the same in all sequences; accuracy is the share of values known. It takes no memory of"
        " the sequence, only weights that learn facts."
    )
    guesses = "any value, at random"
    config: MemorisationConfig

    def __init__(self, config: MemorisationConfig):
        super().__init__(config, 2 * config.keys + 1)
        order = smallest(Draws(config.map_seed, "map", 0, 1).uniforms("", config.keys), config.keys)
        self.values = config.keys + order[0]

    def generate(self, draws: Draws, length: int) -> Batch:
        keys = draws.integers("keys", length // 2, self.config.keys)
        tokens = np.full((draws.size, length), self.vocab_size - 1, dtype=np.int64)
        tokens[:, ::2] = keys
        targets = np.full_like(tokens, IGNORED)
        targets[:, 1::2] = self.values[keys]
        return Batch(tokens, targets)

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return self.config.keys + draws.integers("", batch.targets.shape[1], self.config.keys)
