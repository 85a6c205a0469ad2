"""Compression: read random tokens, then name them by their positions, asked for in random order.

After Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (MAD), whose models must put a sequence
into the output at one last token, from which a decoder of its own names every token. A language model has one output
per position; here the tokens are asked for one by one, by a token for each position. So the state must hold them all,
and may be read n times: attention, which keeps everything, has it easier than there, and numbers do not compare with
MAD's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least, placed, smallest
from experiments.tasks.task import IGNORED, Batch


@dataclass(frozen=True)
class CompressionConfig(GeneratedConfig):
    """Options of :class:`Compression`; T is even: n = T / 2 tokens and as many questions.

    Attributes:
        vocab_size: V, how many tokens there are, besides those that ask for a position.
    """

    length: int = 64
    vocab_size: int = 16

    def __post_init__(self):
        at_least(self, 2, "vocab_size")
        super().__post_init__()

    def check_length(self, length: int) -> None:
        if length % 2 or length < 2:
            raise ValueError(f"length must be even, as many questions as tokens; got {length}")
        if length > self.length:
            raise ValueError(
                f"test_lengths must be at most length ({self.length}), since training has to teach what asks for each"
                f" position; got {length}"
            )


class Compression(GeneratedTask):
    Config = CompressionConfig
    name = "compression"
    title = "Compression"
    reading = (
        "Random tokens are read and then asked for by their positions, in random order; accuracy is the share named"
        " right. Nothing can be left out, so this measures how much a state holds."
    )
    guesses = "any token, at random"
    config: CompressionConfig

    def __init__(self, config: CompressionConfig):
        super().__init__(config, config.vocab_size + config.length // 2)

    def generate(self, draws: Draws, length: int) -> Batch:
        count = length // 2
        read = draws.integers("tokens", count, self.config.vocab_size)
        asked = smallest(draws.uniforms("order", count), count)
        targets = np.full((draws.size, length), IGNORED, dtype=np.int64)
        targets[:, count:] = np.take_along_axis(read, asked, axis=1)
        places = np.broadcast_to(np.arange(count, length), asked.shape)
        groups = {"gap": placed(targets, places, places - asked), "position": placed(targets, places, asked + 1)}
        return Batch(np.concatenate([read, self.config.vocab_size + asked], axis=1), targets, groups=groups)

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return draws.integers("", batch.targets.shape[1], self.config.vocab_size)
