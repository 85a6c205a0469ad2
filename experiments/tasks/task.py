"""The contract of a task: a pure function from (seed, split, index) to examples, and a score of outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

SPLITS = ("train", "validation", "test")
IGNORED = -100
"""The target of a position that is not asked about."""

UNGROUPED = -1
"""The number, in a group, of a position that belongs to none."""


class TaskError(Exception):
    """Options whose examples this machine cannot make: its text says what a person can choose instead."""


class Batch(NamedTuple):
    """Some rows of a task.

    Attributes:
        tokens: ``[B, T]`` int64.
        targets: ``[B, T]`` int64; ``targets[b, t]`` is what position t should predict, or ``IGNORED``.
        token_mask: ``[B, T]`` bool, false where a token is padding after a row's end; ``None`` where none is. A token
            whose target is ignored is read all the same, and no padding; nor is filler that belongs to the task.
        groups: ``[B, T]`` numbers by name, by which answers are told apart in the results: ``gap``, the tokens from
            where an answer was shown to where it is asked for; ``depth``, where it was shown, as a share of the text;
            ``position``, ... Read where a target is not ignored; ``UNGROUPED`` where an answer belongs to none.
        begins: ``[B, T]`` bool, true where a text begins, before which a model's state is the initial one; ``None``
            where each row is one text.
    """

    tokens: np.ndarray
    targets: np.ndarray
    token_mask: np.ndarray | None = None
    groups: dict[str, np.ndarray] | None = None
    begins: np.ndarray | None = None

    def read(self) -> dict[str, np.ndarray | None]:
        """What a model is trained on: ``tokens``, ``targets``, ``token_mask`` and ``begins``."""
        parts = {"tokens": self.tokens, "targets": self.targets}
        return {**parts, "token_mask": self.token_mask, "begins": self.begins}

    def rows(self, index: Any) -> Batch:
        """Some of its rows."""
        mask = None if self.token_mask is None else self.token_mask[index]
        groups = None if self.groups is None else {name: numbers[index] for name, numbers in self.groups.items()}
        begins = None if self.begins is None else self.begins[index]
        return Batch(self.tokens[index], self.targets[index], mask, groups, begins)


@dataclass(frozen=True)
class Metric:
    """The number by which models are compared on a task.

    Attributes:
        name: its key in the results.
        label: how an axis calls it.
        unit: ``""`` for a share between 0 and 1.
        higher_is_better: whether more is better.
    """

    name: str
    label: str
    unit: str
    higher_is_better: bool


class Task:
    """A task, made from ``Config``; no torch in here, so that data can be made anywhere.

    Attributes:
        name: its key in ``TASKS``.
        title, reading: its name for people, and how to read its results, for reports.
        metric: the number by which models are compared on it.
        test_options: the options that only list further tests of the task.
        tokens: ``"bytes"`` where each token below 256 is that byte of a text, and at most 256 is none, the start of
            one: what the record says of it, and by which ``seqarch.load`` gives the model a tokenizer.
        vocab_size: number of tokens.
        length: tokens of a training sequence.
        longest: tokens of the longest sequence it is evaluated on.
        tests: the test splits, and how many tokens their sequences have. ``test``, which results are headed by, is the
            first; others differ from it in length alone.
        continues: whether each row of a training batch goes on where that row of the batch before ended, so that a
            model's state can; its batches then come from :meth:`continued_batch`.
    """

    Config: ClassVar[type]
    name: ClassVar[str]
    title: ClassVar[str]
    reading: ClassVar[str]
    metric: ClassVar[Metric]
    test_options: ClassVar[tuple[str, ...]] = ()
    tokens: ClassVar[str | None] = None
    config: Any
    vocab_size: int
    length: int
    longest: int
    tests: dict[str, int]
    continues: bool = False

    def __init__(self, config: Any):
        raise TypeError(f"{type(self).__name__} defines no __init__")

    def train_batch(self, seed: int, start: int, size: int) -> Batch:
        """Training examples ``start`` to ``start + size`` of the stream of ``seed``."""
        raise TypeError(f"{type(self).__name__} defines no train_batch")

    def continued_batch(self, seed: int, number: int, rows: int, first: int, size: int) -> Batch:
        """Rows ``first`` to ``first + size`` of the ``rows`` of training batch ``number``, counted from 0.

        Its ``begins`` are true where a text begins, and where a row goes on elsewhere than it ended.
        """
        raise TypeError(f"{type(self).__name__} defines no continued_batch")

    def evaluation(self, split: str) -> Iterator[Batch]:
        """The whole ``validation`` split, or one of :attr:`tests`: the same for every run."""
        raise TypeError(f"{type(self).__name__} defines no evaluation")

    def score(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
        """The metrics of a split.

        Args:
            targets: ``[N, T]`` as :meth:`evaluation` gave them.
            losses: ``[N, T]``, minus the natural logarithm of the probability of each target.
            hits: ``[N, T]``, whether the target was the likeliest token.

        Returns:
            Numbers by name, ``metric.name`` and ``loss`` (the mean over what is asked, in nats) among them. An optional
            ``"curve"`` holds ``x``, ``y`` (lists of equal length), ``x_end``, ``x_label``, ``x_unit`` and
            ``trained_to``: the metric along something.
        """
        raise TypeError(f"{type(self).__name__} defines no score")

    def item_scores(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """``[N]`` float64, the metric of each sequence by itself; the arguments are those of :meth:`score`.

        Where every sequence has as many targets, their mean is the metric of the split. Differences between models are
        judged by them: which of two is better on the same sequences.
        """
        raise TypeError(f"{type(self).__name__} defines no item_scores")

    def answer_scores(self, targets: np.ndarray, losses: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """``[N, T]``: what each answer adds to the metric, which is their mean over what is asked and grouped.

        Whoever gives its batches groups defines it; arguments as in :meth:`score`.
        """
        raise TypeError(f"{type(self).__name__} defines no answer_scores")

    def chance(self, split: str = "test") -> tuple[float, str]:
        """The score on a test split of a model that learnt nothing of the task's point, and in words who that is."""
        raise TypeError(f"{type(self).__name__} defines no chance")

    def manifest(self) -> dict[str, Any]:
        """A description of the data, with a ``hash`` over all that runs are evaluated on."""
        raise TypeError(f"{type(self).__name__} defines no manifest")

    def kept_files(self) -> dict[str, bytes]:
        """Files by name that a run's folder keeps of the data: ``tokenizer.json``, without which nobody could use the
        model, and ``data_files.txt``, by which a change of the data is told; none of data that is drawn.
        """
        return {}


def stream(seed: int, split: str, purpose: str = "") -> np.random.Philox:
    """A counter-based generator of its own for each (seed, split, purpose).

    Example ``i`` owns a fixed stretch of the counter, so it is the same however examples are dealt out to workers.
    """
    digest = hashlib.sha256(f"{seed}/{split}/{purpose}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def uniforms(generator: np.random.Philox, start: int, size: int, each: int) -> np.ndarray:
    """``[size, each]`` doubles in (0, 1): those of examples ``start`` to ``start + size``."""
    blocks = -(-each // 4)  # A Philox counter step yields four words.
    generator.advance(start * blocks)
    words = generator.random_raw(size * blocks * 4).reshape(size, blocks * 4)[:, :each]
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def digest_batches(config: Any, batches: Iterator[Batch]) -> str:
    """A hash over a task's options and examples."""
    digest = hashlib.sha256(repr(sorted(asdict(config).items())).encode())
    for batch in batches:
        digest.update(np.ascontiguousarray(batch.tokens, "<i8").tobytes())
        digest.update(np.ascontiguousarray(batch.targets, "<i8").tobytes())
    return digest.hexdigest()
