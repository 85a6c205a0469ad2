"""The runs of a study, trained through the runner: what is finished is not done again."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config.overrides import compose, parse_choice
from experiments.config.schema import RunConfig
from experiments.sweeps.execute import execute, resolve_composed
from experiments.sweeps.session import SweepSession
from experiments.util.interrupts import INTERRUPTED


@dataclass(frozen=True)
class Sweep:
    """The runs of a study at one size, in the grammar of ``experiments.run``.

    Attributes:
        common: what all runs share, ``"experiment=recall_and_state seed=0,1,2"``.
        grid: what differs between them, in rows; choices within a row multiply.
    """

    common: str
    grid: tuple[str, ...]

    def arguments(self) -> Iterator[list[str]]:
        """The command line of each run."""
        for row in self.grid:
            yield from _expanded(shlex.split(f"{self.common} {row}"))


def _expanded(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of the choices among ``key=a,b`` arguments; the last one of a key counts, as in Hydra."""
    choices: dict[str, list[str]] = {}
    for argument in arguments:
        key, value = parse_choice(argument)
        choices[key] = [f"{key}={each}" for each in value] if isinstance(value, list) else [argument]
    yield from (list(each) for each in itertools.product(*choices.values()))


def composed(sweep: Sweep, runs: Path) -> list[dict[str, Any]]:
    """The composed configuration of every run of a sweep, below the folder ``runs``.

    Raises:
        ConfigError: Hydra refuses an argument.
    """
    return [compose([*arguments, f"runs={runs}"]) for arguments in sweep.arguments()]


def configurations(sweep: Sweep, runs: Path) -> list[RunConfig]:
    """The same, typed and sure to build their models; each once.

    Raises:
        ConfigError: naming the path of what is wrong.
    """
    found = [resolve_composed(each) for each in composed(sweep, runs)]
    return list({config.folder(): config for config in found}.values())


def train(sweep: Sweep, runs: Path, jobs: int) -> int:
    """Train what is missing, ``jobs`` runs at a time; 0 when nothing is left to do, 1 where a run failed, 130 when
    stopped. The runs that fail stay on record as failed.
    """
    session = SweepSession()
    session.watch_signals()
    wanted = composed(sweep, runs)
    status = session.open(str(runs), len(wanted))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda number: execute(wanted[number], status, number), range(len(wanted))))
    outcome = session.close()
    if session.stopped.is_set():
        return INTERRUPTED
    return int(not outcome.shown or outcome.done < len(wanted))
