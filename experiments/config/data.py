"""The data of a run: what each step trains on, what it is validated on, and every test split.

Everything is a function of the configuration, the seed, the step and, in a curriculum, the stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from experiments.config.schema import RunConfig
from experiments.config.tasks import Overrides, TrainOn, label, split_name
from experiments.tasks import TASKS, Batch, Task
from experiments.tasks.task import stream, uniforms


class HeldOut(NamedTuple):
    """A test split: of which task, under which name there, and in which options that differs from the run's task."""

    task: Task
    split: str
    overrides: Overrides

    @property
    def length(self) -> int:
        return self.task.tests[self.split]


@dataclass(frozen=True)
class Source:
    """What training steps take their batches from: the run's task, or an entry of ``task.train_on``.

    Attributes:
        name: by its options, as in the metrics.
        stream: the number of its stream among those of the seed; ``None`` for the stream of the seed itself.
        batch_size: sequences per step, of all processes together.
        micro_batch: sequences that one process takes at a time; 0 for its whole share.
        share: of the steps of a mixture.
    """

    task: Task
    name: str
    overrides: Overrides
    stream: int | None
    batch_size: int
    micro_batch: int
    share: float

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.task.length

    def batch(self, seed: int, step: int, first: int = 0, size: int | None = None) -> Batch:
        """The batch of a step, counted from 0, or ``size`` of its rows from ``first`` on.

        Each source has a stream of its own and, whatever the steps before took, its rows ``step * batch_size`` and on.
        """
        if self.stream is not None:
            digest = hashlib.sha256(f"{seed}/train_on/{self.stream}".encode()).digest()
            seed = int.from_bytes(digest[:8], "little") >> 1
        rows = self.batch_size if size is None else size
        if self.task.continues:
            return self.task.continued_batch(seed, step, self.batch_size, first, rows)
        return self.task.train_batch(seed, step * self.batch_size + first, rows)


@dataclass(frozen=True)
class Data:
    """The data of one run.

    Attributes:
        task: the run's task.
        sources: what it is trained on: the task alone, or the entries of ``task.train_on``.
        is_curriculum: whether these follow one another; else each step draws one by their shares.
        tests: the test splits by name; ``test`` is the first.
    """

    seed: int
    task: Task
    sources: tuple[Source, ...]
    is_curriculum: bool
    tests: dict[str, HeldOut]

    def number(self, step: int, stage: int) -> int:
        """The number of the source that a step, counted from 0, is of."""
        if self.is_curriculum:
            return stage
        if len(self.sources) == 1:
            return 0
        drawn = uniforms(stream(self.seed, "train", "mixture"), step, 1, 1)[0, 0]
        ends = np.cumsum([source.share for source in self.sources])
        return int(np.searchsorted(ends[:-1], drawn * ends[-1], side="right"))

    def source(self, step: int, stage: int) -> Source:
        """The source of a step, counted from 0."""
        return self.sources[self.number(step, stage)]

    def validated(self, stage: int) -> Task:
        """The task whose validation split is used: of a curriculum its stage's, else the run's task."""
        return self.sources[stage].task if self.is_curriculum else self.task

    def tokens_per_step(self, stage: int) -> float:
        """Of a step in a curriculum's stage; of a mixture, the expectation."""
        if self.is_curriculum:
            return self.sources[stage].tokens
        total = sum(source.share for source in self.sources)
        return sum(source.share * source.tokens for source in self.sources) / total

    def tokens(self, steps: Sequence[int]) -> int:
        """Of so many steps on each source."""
        return sum(number * source.tokens for number, source in zip(steps, self.sources, strict=True))

    @property
    def trained_to(self) -> int:
        """Tokens of the longest training sequence."""
        return max(source.task.length for source in self.sources)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the run trains or is tested on."""
        return max(self.task.longest, self.trained_to, *(held_out.length for held_out in self.tests.values()))

    def manifest(self) -> dict[str, Any]:
        """The task's own; with further test splits, their data too, and a ``hash`` over that of all."""
        found = self.task.manifest()
        others = {name: each for name, each in self.tests.items() if each.task is not self.task}
        if others:
            manifests = {name: each.task.manifest() for name, each in others.items()}
            found |= {name: each[others[name].split] for name, each in manifests.items() if others[name].split in each}
            hashes = " ".join([found["hash"], *(f"{name} {each['hash']}" for name, each in manifests.items())])
            found["hash"] = hashlib.sha256(hashes.encode()).hexdigest()
        return found


def build_data(config: RunConfig) -> Data:
    """The data of a configuration's run."""
    given = config.task
    task = TASKS[given.name](given.options)
    train = config.train
    main = Source(task, label({}), {}, None, train.batch_size, train.micro_batch, 1.0)
    sources = [_source(config, main, number, entry) for number, entry in enumerate(given.train_on)]
    tests = {split: HeldOut(task, split, {}) for split in task.tests}
    for number, overrides in enumerate(given.test_on):
        other = TASKS[given.name](given.with_overrides(overrides, f"task.test_on[{number}]"))
        tests[split_name(overrides)] = HeldOut(other, "test", overrides)
    return Data(config.seed, task, tuple(sources) or (main,), given.order == "curriculum", tests)


def _source(config: RunConfig, main: Source, number: int, entry: TrainOn) -> Source:
    """An entry of ``task.train_on``: unless it says otherwise, with about the tokens per step of the run's task."""
    given = config.task
    task = TASKS[given.name](given.with_overrides(entry.overrides, f"task.train_on[{number}]"))
    fitting = max(1, round(main.tokens / task.length))
    at_a_time = max(1, main.micro_batch * main.task.length // task.length) if main.micro_batch else 0
    name = label(entry.overrides)
    return Source(task, name, entry.overrides, number, entry.batch_size or fitting, at_a_time, entry.share)
