"""The runs of a study, trained through the runner: each is recorded as soon as it is over, and what follows from it is
started next.
"""

from __future__ import annotations

import copy
import fcntl
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.config.overrides import compose
from experiments.config.schema import RunConfig, TrainConfig, flat
from experiments.runs.folder import RunFolder
from experiments.studies import plan
from experiments.studies.protocol import Arm, Wanted
from experiments.studies.records import Ledger, rounded, shortened, to_line
from experiments.studies.trained import Results, Version
from experiments.sweeps.execute import execute, resolve_composed
from experiments.sweeps.session import SweepSession
from experiments.util.errors import RunnerError
from experiments.util.interrupts import INTERRUPTED

LONG_TESTS = ("test_lengths", "test_on")
"""The options of a task that name tests besides that of its own options."""


class Composer:
    """Composes the configurations of a version's runs below the folder ``runs``: each arm once, for it takes long.

    Args:
        ledger: of the runs that are over, which others may start from or learn of.
    """

    def __init__(self, version: Version, runs: Path, ledger: Ledger | None = None):
        self._version, self._runs, self._ledger = version, runs, ledger
        self._arms: dict[str, dict[str, Any]] = {}

    def __call__(self, wanted: Wanted) -> dict[str, Any]:
        """The composed configuration of a run.

        Raises:
            ConfigError: Hydra refuses an argument.
        """
        if wanted.arm not in self._arms:
            arm = self._arm(wanted)
            arguments = shlex.split(f"{self._version.common} {arm.overrides}")
            self._arms[wanted.arm] = compose([*arguments, f"runs={self._runs}"])
        composed = copy.deepcopy(self._arms[wanted.arm])
        if self._version.protocol.tests_for_reporting and wanted.stage != "reporting":
            composed["task"] |= {key: [] for key in LONG_TESTS if key in composed["task"]}
        composed["seed"], composed["train"]["lr"] = wanted.seed, wanted.rate
        composed["shown"] = {"train.lr": wanted.rate, **composed.get("shown", {})}
        composed["train"] |= {key: str(path) for key, path in self.sources(wanted).items()}
        if wanted.steps is not None:
            composed["train"] |= _fixed(composed["train"], wanted.steps)
        return composed

    def _arm(self, wanted: Wanted) -> Arm:
        return next(arm for arm in self._version.arms if arm.name == wanted.arm)

    def sources(self, wanted: Wanted) -> dict[str, Path]:
        """The folders of the runs that a run starts from and learns of, by the options that name them.

        Raises:
            RunnerError: one of them is not over.
        """
        arm, folders = self._arm(wanted), {}
        for key, name in arm.sources.items():
            run = None if self._ledger is None else Results(self._version, self._ledger.runs).source(name, wanted.seed)
            if run is None:
                raise RunnerError(f"the arm {arm.name!r} needs a run of {name!r} with the seed {wanted.seed}")
            folders[key] = self._runs / run.config["experiment"] / run.name
        return folders


def _fixed(train: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A schedule of so many steps, whose decay is as long, relative to the stable phase, as in the run to double."""
    if train.get("schedule") != "until_converged":
        return {"steps": steps}
    share = train.get("decay_share", TrainConfig.decay_share)
    return {"schedule": "wsd", "steps": steps, "decay_share": share / (1 + share)}


def train(version: Version, folder: Path, runs: Path, jobs: int, history: Sequence[str] = ()) -> int:
    """Train what is missing, ``jobs`` runs at a time, and record it in ``folder`` with this of its evaluations.

    Returns:
        0 when nothing is left to do, 1 where a run was refused or could not be recorded, 130 when stopped. Runs that
        fail are on record as failed, and no arm waits for them.

    Raises:
        RunnerError: the records that are there are of other configurations.
    """
    with alone(folder):
        ledger = Ledger(folder)
        composer = Composer(version, runs, ledger)
        plan.check_records(version, {run.record["study"]["plan"] for run in ledger.runs}, folder)
        check_records(ledger, composer, version)
        return _train(version, ledger, composer, runs, jobs, history)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the records of a study against other processes of this machine.

    Raises:
        RunnerError: another process trains it.
    """
    with open(folder / plan.FILE) as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunnerError(f"another process trains the study in {folder}; wait for it, or end it") from None
        yield


def _train(version: Version, ledger: Ledger, composer: Composer, runs: Path, jobs: int, history: Sequence[str]) -> int:
    session = SweepSession()
    session.watch_signals()
    status = session.open(str(runs), len(missing(version, ledger)))
    begun: dict[Future[None], tuple[Wanted, RunConfig]] = {}
    count, given_up = 0, set()
    with ThreadPoolExecutor(jobs) as pool:
        while not session.stopped.is_set():
            busy = {wanted.key for wanted, _ in begun.values()} | given_up
            todo = [each for each in missing(version, ledger) if each.key not in busy]
            session.expect(count + len(todo))
            for wanted in todo[: jobs - len(begun)]:
                composed = composer(wanted)
                begun[pool.submit(execute, composed, status, count)] = wanted, resolve_composed(composed)
                count += 1
            if not begun:
                break
            for done in wait(begun, return_when=FIRST_COMPLETED).done:
                wanted, config = begun.pop(done)
                done.result()
                if not _record(version, ledger, wanted, config, history):
                    given_up.add(wanted.key)
    for wanted, config in begun.values():
        _record(version, ledger, wanted, config, history)
    session_stopped = session.stopped.is_set()
    session.close()
    return INTERRUPTED if session_stopped else int(bool(given_up))


def missing(version: Version, ledger: Ledger) -> list[Wanted]:
    """The runs that are known to be missing and can be made by now, arm by arm."""
    results = Results(version, ledger.runs)
    return [wanted for progress in results.arms.values() for wanted in progress.wanted()
            if all(results.source(name, wanted.seed) for name in progress.arm.sources.values())]  # fmt: skip


def _record(version: Version, ledger: Ledger, wanted: Wanted, config: RunConfig, history: Sequence[str]) -> bool:
    """Add the line of a run that has ended; whether it is over."""
    named = {"arm": wanted.arm, "stage": wanted.stage, "plan": version.plan}
    line = to_line(config, RunFolder(config.folder()), named, history)
    if line is not None:
        ledger.add(line)
    return line is not None


def check_records(ledger: Ledger, composer: Composer, version: Version) -> None:
    """Check that the last recorded run of every stage of every arm is as the study would make it now.

    Those whose start or teacher was trained on another machine are passed over: without these they cannot be made.

    Raises:
        RunnerError: an arm's options were edited after its first run.
    """
    arms: dict[str, Arm] = {arm.name: arm for arm in version.arms}
    last = {(run.record["study"]["arm"], run.record["study"]["stage"]): run for run in ledger.runs}
    for run in last.values():
        study = run.record["study"]
        if study["arm"] not in arms:
            continue
        steps = run.config["train"]["steps"] if study["stage"] == "doubled" else None
        wanted = Wanted(study["arm"], study["stage"], run.config["train"]["lr"], run.config["seed"], steps)
        if not all(path.is_dir() for path in composer.sources(wanted).values()):
            continue
        here, there = flat(rounded(shortened(resolve_composed(composer(wanted))))), flat(run.config)
        if different := sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key)):
            key = different[0]
            raise RunnerError(
                f"{key} is {there.get(key)!r} in the recorded runs of the arm {study['arm']!r} and {here.get(key)!r} in"
                " the study: what an arm is trained with stays as it was before its first run. Restore it, or give the"
                " new arm another name"
            )
