"""Parity of a stream of bits: after each bit, whether the number of ones so far is odd.

The smallest regular language that needs a state which flips, and so the usual witness that linear recurrences need
negative eigenvalues: Grazzi et al. 2024, "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues". There,
as in Deletang et al. 2022, a sequence of 3 to 40 bits has one label, at its end; here every prefix is labelled, so that
a stream of 40 bits trains all lengths up to 40 at once and every position is scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, positions
from experiments.tasks.task import Batch


@dataclass(frozen=True)
class ParityConfig(GeneratedConfig):
    """Options of :class:`Parity`; T is the number of bits."""

    length: int = 40


class Parity(GeneratedTask):
    Config = ParityConfig
    name = "parity"
    title = "Parity of a stream of bits"
    reading = (
        "After every bit the model says whether it has seen an odd number of ones; accuracy is the share of positions"
        " at which it is right. One bit of state is enough, but it must be flipped exactly, at any length."
    )
    guesses = "either answer, at random"
    config: ParityConfig

    def __init__(self, config: ParityConfig):
        super().__init__(config, vocab_size=2)

    def generate(self, draws: Draws, length: int) -> Batch:
        bits = draws.integers("bits", length, 2)
        targets = np.cumsum(bits, axis=1) % 2
        return Batch(bits, targets, groups=positions(targets))

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return draws.integers("", batch.targets.shape[1], 2)
