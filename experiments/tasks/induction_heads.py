"""Induction heads: what followed the special token, when it comes a second time?

Gu and Dao 2023, "Mamba", section 4.1.2, after Olsson et al. 2022: a random sequence over V tokens in which one of them,
the special one, occurs once at random and again at the very end. Trained at 256 tokens and tested up to 2^20 there. One
answer per sequence; the special token may be anywhere that leaves room for what follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least, placed
from experiments.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class InductionHeadsConfig(GeneratedConfig):
    """Options of :class:`InductionHeads`; T counts both special tokens.

    Attributes:
        vocab_size: V, the special token among them.
    """

    length: int = 256
    vocab_size: int = 16

    def __post_init__(self):
        at_least(self, 3, "vocab_size")
        super().__post_init__()

    def check_length(self, length: int) -> None:
        if length < 3:
            raise ValueError(f"length must be at least 3, the special token twice and a token between; got {length}")


class InductionHeads(GeneratedTask):
    Config = InductionHeadsConfig
    name = "induction_heads"
    title = "Induction heads"
    reading = (
        "A special token occurs once in a random sequence and again at its end; accuracy is the share of sequences in"
        " which the model names what followed it before. One pair of tokens must be noticed, and kept for any time."
    )
    guesses = "any token but the special one, at random"
    config: InductionHeadsConfig

    def __init__(self, config: InductionHeadsConfig):
        super().__init__(config, config.vocab_size)

    def generate(self, draws: Draws, length: int) -> Batch:
        special = self.vocab_size - 1
        tokens = draws.integers("tokens", length, special)
        place = draws.integers("place", 1, length - 2)
        np.put_along_axis(tokens, place, special, axis=1)
        tokens[:, -1] = special
        targets = np.full_like(tokens, IGNORED)
        targets[:, -1:] = np.take_along_axis(tokens, place + 1, axis=1)
        last = np.full_like(place, length - 1)
        return Batch(tokens, targets, groups={"gap": placed(targets, last, last - place - 1)})

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return draws.integers("", batch.targets.shape[1], self.vocab_size - 1)
