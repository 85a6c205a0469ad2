"""The base of tasks whose examples are drawn: their splits, at any lengths, their score and their chance level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from experiments.tasks.task import IGNORED, UNGROUPED, Batch, Metric, Task, digest_batches, stream, uniforms

EVALUATION_BATCH = 256
EVALUATION_TOKENS = 16384


@dataclass(frozen=True)
class GeneratedConfig:
    """Options of every task that is generated.

    Attributes:
        length: T, tokens of a sequence in training, in validation and in the first test.
        test_lengths: other lengths to test at, after training.
        validation_examples: size of the validation split.
        test_examples: size of each test split.
    """

    length: int = 64
    test_lengths: list[int] = field(default_factory=list)
    validation_examples: int = 512
    test_examples: int = 2048

    def __post_init__(self):
        at_least(self, 1, "validation_examples", "test_examples")
        for length in (self.length, *self.test_lengths):
            self.check_length(length)
        if len({self.length, *self.test_lengths}) < 1 + len(self.test_lengths):
            raise ValueError(
                f"test_lengths must be lengths other than length ({self.length}), each once; got {self.test_lengths}"
            )

    def check_length(self, length: int) -> None:
        """Raise ``ValueError`` where no sequence of the task can have that many tokens."""
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")


def at_least(config: Any, least: int, *names: str) -> None:
    """Raise ``ValueError`` where an option is less than that."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")


@dataclass(frozen=True)
class Draws:
    """The random numbers of examples ``start`` to ``start + size`` of a split; each purpose has a stream of its own."""

    seed: int
    split: str
    start: int
    size: int

    def uniforms(self, purpose: str, each: int) -> np.ndarray:
        """``[size, each]`` doubles in (0, 1)."""
        return uniforms(stream(self.seed, self.split, purpose), self.start, self.size, each)

    def integers(self, purpose: str, each: int, below: int) -> np.ndarray:
        """``[size, each]`` int64, each of 0 .. ``below`` - 1 as likely as any other (to 2^-52)."""
        return (self.uniforms(purpose, each) * below).astype(np.int64)

    def places(self, purpose: str, among: int, count: int) -> np.ndarray:
        """``[size, count]`` different numbers of 0 .. ``among`` - 1, in increasing order."""
        return np.sort(smallest(self.uniforms(purpose, among), count), axis=1)


def smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` smallest of each row, smallest first."""
    if count < scores.shape[1]:
        few = np.argpartition(scores, count - 1, axis=1)[:, :count]
    else:
        few = np.broadcast_to(np.arange(count), scores.shape)
    order = np.argsort(np.take_along_axis(scores, few, axis=1), axis=1)
    return np.take_along_axis(few, order, axis=1)


def placed(targets: np.ndarray, places: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A group ``[B, T]``: the numbers ``[B, n]`` at those places of a row, and none elsewhere."""
    group = np.full(targets.shape, UNGROUPED, dtype=numbers.dtype)
    np.put_along_axis(group, places, numbers, axis=1)
    return group


def positions(targets: np.ndarray) -> dict[str, np.ndarray]:
    """The group ``position``: how many tokens have been read."""
    return {"position": np.broadcast_to(1 + np.arange(targets.shape[1]), targets.shape)}


def last_shown(shown: np.ndarray) -> np.ndarray:
    """``[B, N, K]``: the step before each of N at which each of K keys was last shown, -1 where it was not."""
    steps = np.arange(shown.shape[1])[:, None]
    newest = np.maximum.accumulate(np.where(shown, steps, -1), axis=1)
    return np.concatenate([np.full_like(newest[:, :1], -1), newest[:, :-1]], axis=1)


class GeneratedTask(Task):
    """A task whose examples :meth:`generate` makes from random numbers that (seed, split, index) determine.

    Attributes:
        guesses: in words, who makes :meth:`guess`.
    """

    config: GeneratedConfig
    metric = Metric("accuracy", "Accuracy", "", higher_is_better=True)
    test_options = ("test_lengths",)
    guesses: ClassVar[str]

    def __init__(self, config: GeneratedConfig, vocab_size: int):
        self.config, self.vocab_size, self.length = config, vocab_size, config.length
        self.tests = {"test": config.length, **{f"test_{length}": length for length in config.test_lengths}}
        self.longest = max(self.tests.values())

    def generate(self, draws: Draws, length: int) -> Batch:
        """Examples of ``length`` tokens, each made of its own row of random numbers."""
        raise TypeError(f"{type(self).__name__} defines no generate")

    def guess(self, batch: Batch, draws: Draws) -> np.ndarray:
        """``[B, T]`` answers of somebody who knows which answers there are, and nothing else."""
        raise TypeError(f"{type(self).__name__} defines no guess")

    def train_batch(self, seed: int, start: int, size: int) -> Batch:
        return self.examples(seed, "train", start, size)

    def examples(self, seed: int, split: str, start: int, size: int) -> Batch:
        """Examples ``start`` to ``start + size``: each a function of (seed, split, index) alone."""
        return self.generate(Draws(seed, split, start, size), self.tests.get(split, self.length))

    def evaluation(self, split: str) -> Iterator[Batch]:
        total = self.config.validation_examples if split == "validation" else self.config.test_examples
        rows = min(EVALUATION_BATCH, max(1, EVALUATION_TOKENS // self.tests.get(split, self.length)))
        for start in range(0, total, rows):
            yield self.examples(0, split, start, min(rows, total - start))

    def score(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
        """``accuracy`` is the share of right answers, ``sequence_accuracy`` that of sequences without a wrong one."""
        asked = targets != IGNORED
        return {
            "accuracy": float(hits[asked].mean()),
            "sequence_accuracy": float((hits | ~asked).all(axis=1).mean()),
            "loss": float(losses[asked].mean()),
        }

    def item_scores(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """The share of right answers of each sequence; NaN of one that asks nothing."""
        asked = targets != IGNORED
        answers = asked.sum(axis=1)
        shares = np.full(len(targets), np.nan)
        return np.divide((hits & asked).sum(axis=1), answers, out=shares, where=answers > 0)

    def answer_scores(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> np.ndarray:
        return hits

    def chance(self, split: str = "test") -> tuple[float, str]:
        """The score of :meth:`guess` on the whole split."""
        asked, hits, start = [], [], 0
        for batch in self.evaluation(split):
            guesses = self.guess(batch, Draws(0, f"{split}/guess", start, len(batch.tokens)))
            asked.append(batch.targets)
            hits.append(guesses == batch.targets)
            start += len(batch.tokens)
        targets = np.concatenate(asked)
        return self.score(targets, np.zeros(targets.shape), np.concatenate(hits))[self.metric.name], self.guesses

    def manifest(self) -> dict[str, Any]:
        batches = (batch for split in ("validation", *self.tests) for batch in self.evaluation(split))
        sizes = {split: f"{self.config.test_examples} sequences of {length}" for split, length in self.tests.items()}
        return {
            "source": "generated",
            "validation": f"{self.config.validation_examples} sequences of {self.length}",
            **sizes,
            "hash": digest_batches(self.config, batches),
        }


class WholeAnswersTask(GeneratedTask):
    """A task whose answers are words or numbers of several tokens, each right as a whole or not at all.

    Once its first letters are known, the rest of a word can be copied from any place where it stands, so that the share
    of right letters would flatter.

    Attributes:
        answer_tokens: of every answer.
    """

    answer_tokens: ClassVar[int]

    def score(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
        """As of every generated task, ``accuracy`` of whole answers, and ``token_accuracy`` besides."""
        scores = super().score(targets, losses, hits)
        return {**scores, "accuracy": float(self._right(targets, hits).mean()), "token_accuracy": scores["accuracy"]}

    def answer_scores(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> np.ndarray:
        scores = np.zeros(targets.shape)
        scores[targets != IGNORED] = np.repeat(self._right(targets, hits), self.answer_tokens)
        return scores

    def item_scores(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> np.ndarray:
        return super().item_scores(targets, losses, self.answer_scores(targets, losses, hits) > 0)

    def _right(self, targets: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """Of each answer, in order, whether all its tokens are right."""
        return np.all(hits[targets != IGNORED].reshape(-1, self.answer_tokens), axis=1)
