"""A study: a question, how it is answered, and what its page shows.

:class:`Study` is all that the command and the pages know of one. There are two kinds: those that train models
(:class:`experiments.studies.trained_study.TrainedStudy`), and one that measures them
(:class:`experiments.studies.decoding.Decoding`).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from matplotlib.axes import Axes

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
    """Rows of cells, the header first, and a sentence below them."""

    title: str
    rows: list[list[str]]
    note: str = ""


def digest(fixed: Mapping[str, Any]) -> str:
    """The hash of what is fixed before a study's first record."""
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]


class Planned:
    """A study at one size."""

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """All that is fixed before the first record: how it is answered, and every claim with its margin."""
        raise TypeError(f"{type(self).__name__} does not say what is fixed")

    @cached_property
    def plan(self) -> str:
        """The hash of :attr:`fixed`, which every record has."""
        return digest(self.fixed)


V = TypeVar("V", bound=Planned)
R = TypeVar("R")


class Study(ABC, Generic[V, R]):
    """A study; one file each, with one entry in ``STUDIES``. V is the class of its versions, R that of its results.

    Attributes:
        name: its key, and the name of its page and folder in docs/results.
        title: for people.
        question: that the page answers.
        does: what its command does, as in "this trains what is not on record yet".
        versions: by size.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    does: ClassVar[str]
    versions: ClassVar[Mapping[str, Any]]

    @abstractmethod
    def complete(self, version: V, folder: Path, runs: Path, jobs: int) -> int:
        """Train or measure what is missing and record it in ``folder``; the exit code.

        Args:
            runs: the folder of the runs.
            jobs: how many may train at a time.
        """

    @abstractmethod
    def read(self, version: V, folder: Path) -> R:
        """What is on record.

        Raises:
            RunnerError: nothing is, or it is no record.
        """

    @abstractmethod
    def plans(self, results: R) -> set[str]:
        """The plans that the records name."""

    @abstractmethod
    def unfinished(self, results: R) -> Sequence[str]:
        """A sentence where something is missing."""

    @abstractmethod
    def answer(self, results: R) -> str:
        """The answer in one sentence, with its uncertainty."""

    @abstractmethod
    def verdicts(self, results: R) -> Table:
        """A row for every claim."""

    @abstractmethod
    def figures(self, results: R) -> Sequence[Figure]: ...

    @abstractmethod
    def tables(self, results: R) -> Sequence[Table]:
        """What the study shows besides."""

    @abstractmethod
    def made(self, results: R) -> Sequence[Table | str]:
        """How the records came about: tables and paragraphs at the end of the results."""

    @abstractmethod
    def provenance(self, results: R) -> Sequence[str]:
        """What the records are, and where and by which code they were made: paragraphs."""
