"""Multi-query associative recall, as Arora et al. define it (2023, "Zoology", section 3 and appendix).

A sequence of T tokens begins with K pairs ``key value key value ...`` and later asks for every key once: at the key's
second appearance the value is to be predicted. Keys are distinct and from [1, V/2), values distinct and from [V/2, V).
The second appearances stand at even distances after the pairs: slots g = 1 .. (T - 2K) / 2, drawn without replacement
with probability proportional to g^(a - 1). Other positions hold the blank token 0, as in the published
figures, or with ``filler: random`` any token at all, which is harder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.tasks.task import IGNORED, Batch, Metric, Task, digest_batches, stream, uniforms

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class MQARConfig:
    """Options of :class:`MQAR`.

    Attributes:
        vocab_size: V, even.
        length: T, even, at least 4K.
        pairs: K.
        power: a; the smaller, the sooner a key is asked for again.
        filler: ``blank`` or ``random``.
        validation_examples, test_examples: sizes of the two splits.
    """

    vocab_size: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    filler: str = "blank"
    validation_examples: int = 512
    test_examples: int = 2048

    def __post_init__(self):
        if self.pairs < 1 or self.length % 2 or 4 * self.pairs > self.length:
            raise ValueError(
                f"length ({self.length}) must be even and at least 4 * pairs (pairs is {self.pairs}):"
                " two tokens a pair, and as much room to ask for each"
            )
        if self.vocab_size % 2 or self.pairs >= self.vocab_size // 2:
            raise ValueError(f"vocab_size ({self.vocab_size}) must be even and more than twice pairs ({self.pairs})")
        if not self.power > 0:
            raise ValueError(f"power must be positive, got {self.power}")
        if self.filler not in ("blank", "random"):
            raise ValueError(f"filler must be 'blank' or 'random', got {self.filler!r}")
        if min(self.validation_examples, self.test_examples) < 1:
            raise ValueError("validation_examples and test_examples must be at least 1")


class MQAR(Task):
    Config = MQARConfig
    name = "mqar"
    title = "Multi-query associative recall"
    reading = (
        "A sequence shows keys with their values, then asks for each key again; accuracy is the share of values that"
        " the model recalls. A model with a small state must choose what to keep, attention keeps everything."
    )
    metric = Metric("accuracy", "Recall accuracy", "", higher_is_better=True)

    def __init__(self, config: MQARConfig):
        self.config = config
        self.vocab_size, self.length, self.longest = config.vocab_size, config.length, config.length

    def train_batch(self, seed: int, start: int, size: int) -> Batch:
        return self.examples(seed, "train", start, size)

    def evaluation(self, split: str) -> Iterator[Batch]:
        total = self.config.validation_examples if split == "validation" else self.config.test_examples
        for start in range(0, total, EVALUATION_BATCH):
            yield self.examples(0, split, start, min(EVALUATION_BATCH, total - start))

    def examples(self, seed: int, split: str, start: int, size: int) -> Batch:
        """Examples ``start`` to ``start + size``: each a function of (seed, split, index) alone."""
        pairs, length, half = self.config.pairs, self.config.length, self.config.vocab_size // 2
        slots = (length - 2 * pairs) // 2
        u_keys, u_values, u_gaps, u_filler = np.split(
            uniforms(stream(seed, split), start, size, (half - 1) + half + slots + length),
            np.cumsum([half - 1, half, slots]),
            axis=1,
        )
        keys = 1 + _first(u_keys, pairs)
        values = half + _first(u_values, pairs)
        # Adding Gumbel noise to log-weights and sorting draws without replacement, one after the other.
        weights = (self.config.power - 1) * np.log(np.arange(1, slots + 1))
        gaps = _first(np.log(-np.log(u_gaps)) - weights, pairs)

        tokens = np.zeros((size, length), dtype=np.int64)
        if self.config.filler == "random":
            tokens[:] = u_filler * self.config.vocab_size
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        targets = np.full((size, length), IGNORED, dtype=np.int64)
        asked = 2 * pairs + 2 * gaps
        np.put_along_axis(tokens, asked, keys, axis=1)
        np.put_along_axis(targets, asked, values, axis=1)
        return Batch(tokens, targets)

    def score(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
        asked = targets != IGNORED
        return {"accuracy": float(hits[asked].mean()), "loss": float(losses[asked].mean())}

    def chance(self) -> tuple[float, str]:
        return 1 / self.config.pairs, f"guessing among the {self.config.pairs} values seen"

    def manifest(self) -> dict[str, Any]:
        batches = (batch for split in ("validation", "test") for batch in self.evaluation(split))
        return {
            "source": "generated",
            "validation": f"{self.config.validation_examples} sequences",
            "test": f"{self.config.test_examples} sequences",
            "hash": digest_batches(self.config, batches),
        }


def _first(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` smallest of each row, smallest first."""
    if count < scores.shape[1]:
        few = np.argpartition(scores, count - 1, axis=1)[:, :count]
    else:
        few = np.broadcast_to(np.arange(count), scores.shape)
    order = np.argsort(np.take_along_axis(scores, few, axis=1), axis=1)
    return np.take_along_axis(few, order, axis=1)
