"""Selective copying: letters are scattered among blanks, and are to be repeated in order at the end.

Gu and Dao 2023, "Mamba", section 4.1.1: 16 letters of 14 among 4096 places, then 16 markers, at each of which the next
letter is to be named. The gaps differ from example to example, so what to keep and when depends on the input, which
fixed dynamics cannot follow. Letters and places are uniform. The markers carry no letter: an answer that is wrong does
not help the next one. In the generator of MAD (Poli et al. 2024) places come from numpy's global random state, so that
seeds do not fix them, and no blank ever follows the last letter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.tasks.generated import Draws, GeneratedConfig, GeneratedTask, at_least, placed
from experiments.tasks.task import IGNORED, Batch

BLANK = 0


@dataclass(frozen=True)
class SelectiveCopyingConfig(GeneratedConfig):
    """Options of :class:`SelectiveCopying`; T counts the places and the markers.

    Attributes:
        vocab_size: V: the blank, V - 2 letters, and the marker.
        copied: M, how many letters there are.
    """

    length: int = 80
    vocab_size: int = 16
    copied: int = 16

    def __post_init__(self):
        at_least(self, 4, "vocab_size")
        at_least(self, 1, "copied")
        super().__post_init__()

    def check_length(self, length: int) -> None:
        if length < 2 * self.copied:
            raise ValueError(
                f"length ({length}) must be at least 2 * copied (copied is {self.copied}): a place and a marker each"
            )


class SelectiveCopying(GeneratedTask):
    Config = SelectiveCopyingConfig
    name = "selective_copying"
    title = "Selective copying"
    reading = (
        "Letters lie among blanks at places that differ each time, and are then named in order; accuracy is the share"
        " of letters named right. A model must take up letters and pass over blanks, whenever they come."
    )
    guesses = "any letter, at random"
    config: SelectiveCopyingConfig

    def __init__(self, config: SelectiveCopyingConfig):
        super().__init__(config, config.vocab_size)

    def generate(self, draws: Draws, length: int) -> Batch:
        copied, marker = self.config.copied, self.vocab_size - 1
        letters = 1 + draws.integers("letters", copied, self.vocab_size - 2)
        places = draws.places("places", length - copied, copied)
        tokens = np.full((draws.size, length), BLANK, dtype=np.int64)
        np.put_along_axis(tokens, places, letters, axis=1)
        tokens[:, -copied:] = marker
        targets = np.full_like(tokens, IGNORED)
        targets[:, -copied:] = letters
        asked = np.arange(length - copied, length)
        groups = {"gap": asked - places, "position": np.broadcast_to(1 + np.arange(copied), places.shape)}
        asked = np.broadcast_to(asked, places.shape)
        return Batch(tokens, targets, groups={name: placed(targets, asked, each) for name, each in groups.items()})

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        return 1 + draws.integers("", batch.targets.shape[1], self.vocab_size - 2)
