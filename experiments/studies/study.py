"""A study: a question, the arms that answer it, and the claims, with their margins, that its runs are to decide."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.axes import Axes

from experiments.config.overrides import compose
from experiments.config.schema import run_config, without
from experiments.runs.recorded import RecordedRun
from experiments.studies.protocol import Arm, Progress, Protocol
from experiments.studies.records import shortened

VERSIONS = ("small", "recorded", "large")
"""``recorded`` is what the page shows, ``small`` for a few minutes on two cores, ``large`` for a GPU."""


@dataclass(frozen=True)
class Figure:
    """A plot of a study.

    Attributes:
        name: of its file, without ending.
        caption: what the axes and marks are.
        draw: onto the axes, ``columns`` in each of ``rows``.
        size: in inches.
    """

    name: str
    caption: str
    draw: Callable[[list[Axes]], None]
    columns: int = 1
    rows: int = 1
    size: tuple[float, float] = (7.2, 4.4)


@dataclass(frozen=True)
class Table:
    """Rows of cells, the header first."""

    title: str
    rows: list[list[str]]


@dataclass(frozen=True)
class Claim:
    """A statement on differences between arms, with the margin beyond which a difference matters.

    Attributes:
        name: short, for tables and tests.
        said: the statement, with its source.
        pairs: of arms, ``(left, right)``; of several pairs the mean difference counts.
        kind: ``more``: the left ones exceed the right ones by more than the margin; ``equal``: they differ by less.
        margin: in the unit of the metric, or in factors of two of steps.
        split: the test split that is compared.
        threshold: where given, the steps to reach this validation metric are compared, and not the test results.
    """

    name: str
    said: str
    pairs: tuple[tuple[str, str], ...]
    kind: Literal["more", "equal"]
    margin: float
    split: str = "test"
    threshold: float | None = None


def digest(fixed: Mapping[str, Any]) -> str:
    """The hash of what is fixed before a study's first run."""
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Version:
    """A study at one size.

    Attributes:
        common: what all its runs share, in the grammar of ``experiments.run``.
        arms: what is compared. Arms may be added later; what is planned of the others stays.
        protocol: how each of them is tuned and reported.
        claims: what is to be decided.
    """

    common: str
    arms: tuple[Arm, ...]
    protocol: Protocol = field(default_factory=Protocol)
    claims: tuple[Claim, ...] = ()

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """All that is fixed before the first run: the task and its budget, the procedure, the claims."""
        composed = without(compose(shlex.split(self.common)), ("retry", "train.lr"))
        config = shortened(run_config({**composed, "train": {**composed["train"], "lr": 1.0}}))
        configuration = {"task": config["task"], "train": without(config["train"], ("lr",))}
        return {
            "common": self.common,
            "configuration": configuration,
            "protocol": asdict(self.protocol),
            "claims": {claim.name: without(asdict(claim), ("name",)) for claim in self.claims},
        }

    @cached_property
    def plan(self) -> str:
        """The hash of :attr:`fixed`, which every record has."""
        return digest(self.fixed)


@dataclass(frozen=True)
class Results:
    """The recorded runs of a version of a study."""

    version: Version
    runs: Sequence[RecordedRun]

    @cached_property
    def arms(self) -> dict[str, Progress]:
        """The progress of every arm, by its name."""
        protocol, by_key = self.version.protocol, {key_of(run): run for run in self.runs}
        return {
            arm.name: Progress(protocol, arm, {key: run for key, run in by_key.items() if key[0] == arm.name})
            for arm in self.version.arms
        }


def key_of(run: RecordedRun) -> tuple[str, str, float, int]:
    """The arm, the stage, the learning rate and the seed of a recorded run."""
    study = run.record["study"]
    return study["arm"], study["stage"], run.config["train"]["lr"], run.config["seed"]


class Study:
    """A study; one file each, with one entry in ``STUDIES``.

    Attributes:
        name: its key, and the name of its page and folder in docs/results.
        title: for people.
        question: that the page answers.
        versions: by size.
        history: metrics to keep of every evaluation on validation, as in :func:`experiments.studies.records.to_line`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    versions: ClassVar[Mapping[str, Version]]
    history: ClassVar[tuple[str, ...]] = ()

    def answer(self, results: Results) -> str:
        """The answer in one sentence, with its uncertainty."""
        raise TypeError(f"{type(self).__name__} defines no answer")

    def figures(self, results: Results) -> Sequence[Figure]:
        raise TypeError(f"{type(self).__name__} defines no figures")

    def tables(self, results: Results) -> Sequence[Table]:
        raise TypeError(f"{type(self).__name__} defines no tables")


class MeasuredStudy(Study):
    """A study that trains nothing: it measures, and has versions, records and verdicts of its own.

    What :meth:`read` returns takes the place of :class:`Results`. A version has what :mod:`experiments.studies.plan`
    writes: ``plan``, ``common``, ``protocol`` and ``claims``.
    """

    versions: ClassVar[Mapping[str, Any]]

    def measure(self, version: Any, folder: Path) -> int:
        """Measure what is missing, record it in ``folder``, and return the exit code as of training."""
        raise TypeError(f"{type(self).__name__} does not say how it is measured")

    def read(self, version: Any, folder: Path) -> Any:
        """What is on record.

        Raises:
            RunnerError: nothing is, or it is no record.
        """
        raise TypeError(f"{type(self).__name__} does not say how its records are read")

    def unfinished(self, results: Any) -> Sequence[str]:
        """A sentence where something is missing."""
        return []

    def verdicts(self, results: Any) -> Table:
        """A row for every claim."""
        raise TypeError(f"{type(self).__name__} has no verdicts")

    def provenance(self, results: Any) -> str:
        """Where and by which code the records were made."""
        raise TypeError(f"{type(self).__name__} does not say where its records are from")
