"""Needles in source code: the statements and questions of ``needle``, hidden in the standard library's text.

The haystack is a stretch of the files of ``stdlib_text``, end to end: of its training files in training, of its
validation and test files there, so that no text is seen before it is tested on. Hsieh et al. 2024, "RULER", hide
needles in essays, which may not be passed on; these files are on every machine, and a run records which ones it read.

With ``predict: all`` every byte is predicted, as in language modelling, and the digits that are asked for besides: the
accuracy is that of the digits, ``bits_per_byte`` that of everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from experiments.tasks.generated import Draws
from experiments.tasks.needle import Needle, NeedleConfig
from experiments.tasks.stdlib_text import StdlibText, StdlibTextConfig
from experiments.tasks.task import IGNORED, Batch

PREDICTED = ("answers", "all")


@dataclass(frozen=True)
class NeedleTextConfig(NeedleConfig):
    """Options of :class:`NeedleText`.

    Attributes:
        predict: ``answers``, the digits alone, or ``all`` bytes.
    """

    predict: str = "answers"

    def __post_init__(self):
        super().__post_init__()
        if self.predict not in PREDICTED:
            raise ValueError(f"predict must be 'answers' or 'all', got {self.predict!r}")


class NeedleText(Needle):
    Config = NeedleTextConfig
    name = "needle_text"
    title = "Needles in source code"
    reading = (
        "Numbers are stated somewhere in Python's source code and asked for at its end; accuracy is the share of digits"
        " that are right. The text around is worth remembering too, so that the needles compete with it."
    )
    config: NeedleTextConfig

    @cached_property
    def library(self) -> StdlibText:
        return StdlibText(StdlibTextConfig())

    @cached_property
    def texts(self) -> dict[str, np.ndarray]:
        """The bytes of each split's files, end to end."""
        return {split: np.frombuffer(b"".join(files.values()), np.uint8) for split, files in self.library.files.items()}

    def haystack(self, draws: Draws, length: int) -> np.ndarray:
        text = self.texts[draws.split if draws.split in self.texts else "test"]
        begins = draws.integers("text", 1, len(text))
        return text[(begins + np.arange(length)) % len(text)]

    def generate(self, draws: Draws, length: int) -> Batch:
        batch = super().generate(draws, length)
        if self.config.predict == "answers":
            return batch
        following = np.append(batch.tokens[:, 1:], batch.targets[:, -1:], axis=1)
        return batch._replace(targets=following)

    def score(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
        answers = self.answers(targets.shape[1])[1:]
        scores = super().score(self.asked(targets), losses, hits)
        if self.config.predict == "answers":
            return scores
        bits = losses[:, ~answers].astype(np.float64).mean() / np.log(2)
        return {**scores, "loss": float(losses.mean()), "bits_per_byte": float(bits)}

    def item_scores(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """The share of right digits of each sequence, whatever else is predicted."""
        return super().item_scores(self.asked(targets), losses, hits)

    def asked(self, targets: np.ndarray) -> np.ndarray:
        """The targets with all but the answers ignored."""
        return np.where(self.answers(targets.shape[1])[1:], targets, IGNORED)

    def manifest(self) -> dict[str, Any]:
        made, read = super().manifest(), self.library.manifest()
        source = f"generated, in the {read['source']}"
        return {**made, "source": source, "files": read["hash"]}
