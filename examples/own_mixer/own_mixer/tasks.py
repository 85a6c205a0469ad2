"""Majority of a stream of bits: after each bit, whether there were more ones than zeros so far."""

from dataclasses import dataclass

import numpy as np

from experiments.tasks import Batch
from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask


@dataclass(frozen=True)
class MajorityConfig(GeneratedConfig):
    """Options of :class:`Majority`; T is the number of bits."""


class Majority(GeneratedTask):
    """After each of T fair bits, 1 where there were more ones than zeros so far and 0 elsewhere."""

    Config = MajorityConfig
    name = "majority"
    title = "Majority of a stream of bits"
    reading = (
        "After each bit the model says whether there were more ones than zeros; accuracy is the share it has right."
    )
    guesses = "either answer, at random"

    def __init__(self, config: MajorityConfig):
        super().__init__(config, vocab_size=2)

    def generate(self, draws: Draws, length: int) -> Batch:
        bits = draws.integers("bits", length, 2)
        return Batch(bits, (np.cumsum(2 * bits - 1, axis=1) > 0).astype(np.int64))

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return draws.integers("", batch.targets.shape[1], 2)
