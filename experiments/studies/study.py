"""A study: a question, the runs that answer it, and the figures, tables and findings that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from matplotlib.axes import Axes

from experiments.report.comparison import Comparison, compare
from experiments.runs.recorded import RecordedRun
from experiments.studies import records
from experiments.studies.sweep import Sweep
from experiments.util.errors import RunnerError

VERSIONS = ("small", "recorded", "large")
"""``recorded`` is what the page shows, ``small`` for a few minutes on two cores, ``large`` for a GPU."""


@dataclass(frozen=True)
class Figure:
    """A plot of a study.

    Attributes:
        name: of its file, without ending.
        caption: what the axes and marks are, and among which learning rates was chosen.
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
class Finding:
    """A statement of the literature, and whether the recorded runs agree.

    Attributes:
        name: for the test that holds the page to its records.
        said: the statement, with its source.
        seen: what was measured.
        holds: whether that agrees.
    """

    name: str
    said: str
    seen: str
    holds: bool


@dataclass(frozen=True)
class Runs:
    """The recorded runs that a study draws from: its own and those of the studies that it uses, by study."""

    by_study: Mapping[str, list[RecordedRun]] = field(default_factory=dict)

    @property
    def all(self) -> list[RecordedRun]:
        return [run for runs in self.by_study.values() for run in runs]

    def of(self, experiment: str) -> list[RecordedRun]:
        """The runs of one experiment, which several studies may have."""
        found = {run.path: run for run in self.all if run.config["experiment"] == experiment}
        return list(found.values())

    def comparison(self, experiment: str, keep: Callable[[RecordedRun], bool] = lambda run: True) -> Comparison:
        """The settings of an experiment with their learning rates chosen on validation.

        Raises:
            RunnerError: its runs are of no task or of several, or none is finished.
        """
        found = compare([run for run in self.of(experiment) if keep(run)])
        if len(found) != 1 or not found[0].shown:
            there = ", ".join(each.name for each in found) or "nothing"
            raise RunnerError(f"the records hold {there} where finished runs of {experiment} on one task are wanted")
        return found[0]


class Study:
    """A study; one file each, with one entry in ``STUDIES``.

    Attributes:
        name: its key, and the name of its page and folder in docs/results.
        title: for people.
        sweeps: its runs, by version; empty where it draws from other studies' runs alone.
        uses: the studies whose records it draws from besides.
        history: metrics to keep of every evaluation on validation, as in :func:`experiments.studies.records.to_line`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    sweeps: ClassVar[Mapping[str, Sweep]]
    uses: ClassVar[tuple[str, ...]] = ()
    history: ClassVar[tuple[str, ...]] = ()

    def figures(self, runs: Runs) -> Sequence[Figure]:
        raise TypeError(f"{type(self).__name__} defines no figures")

    def tables(self, runs: Runs) -> Sequence[Table]:
        raise TypeError(f"{type(self).__name__} defines no tables")

    def findings(self, runs: Runs) -> Sequence[Finding]:
        """The statements that the page is about, each with its verdict."""
        raise TypeError(f"{type(self).__name__} defines no findings")

    def folders(self, root: Path) -> list[Path]:
        """The folders of its records, and of those of the studies it uses."""
        return [root / name for name in ([self.name] if self.sweeps else []) + list(self.uses)]

    def missing(self, root: Path) -> list[str]:
        """The studies that it needs and of which no runs are recorded below ``root``: its page then says so."""
        return [folder.name for folder in self.folders(root) if not (folder / records.FILE).exists()]

    def read(self, root: Path) -> Runs:
        """The recorded runs below ``root``, such as docs/results.

        Raises:
            RunnerError: some are missing.
        """
        return Runs({folder.name: records.read(folder) for folder in self.folders(root)})
