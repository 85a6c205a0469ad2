"""A sweep in the process that starts it: its status is opened, shown, and stopped in order by a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config.names import PLACE
from experiments.config.schema import folder_path
from experiments.sweeps.execute import finished_before, keep
from experiments.sweeps.monitor import Monitor
from experiments.sweeps.status import DONE, SWEEPS, SweepStatus, sweep_name
from experiments.util.errors import RunnerError
from experiments.util.interrupts import INTERRUPTED
from experiments.util.output import print_error

AGAIN_SECONDS = 1.0
"""Ctrl-C often comes twice, from the terminal and passed on by whoever started this process: that is one request."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a sweep's jobs.

    Attributes:
        total: jobs that were wanted.
        entries: the last status of every job that began.
        shown: whether all of it could be printed.
    """

    total: int
    entries: list[dict[str, Any]]
    shown: bool

    @property
    def done(self) -> int:
        """Jobs that leave nothing to do."""
        return sum(entry["status"] in DONE for entry in self.entries)


class SweepSession:
    """From the start of a sweep to its end.

    Attributes:
        stopped: set once a signal has asked to stop.
        status: of the sweep, from :meth:`open` to :meth:`close`; ``None`` before and after.
    """

    def __init__(self):
        self.stopped = threading.Event()
        self.status: SweepStatus | None = None
        self._monitor: Monitor | None = None
        self._stopped_at = 0.0

    def watch_signals(self) -> None:
        """Have SIGINT, SIGTERM and SIGHUP stop the sweep in order, and a second one end this process at once.

        Before the sweep is open there is nothing to stop, and the first one ends the process.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # As nohup asks for.
                signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        again = self.stopped.is_set() and time.monotonic() - self._stopped_at > AGAIN_SECONDS
        if self.status is None or again:
            os._exit(INTERRUPTED)
        if self.stopped.is_set():
            return
        self._stopped_at = time.monotonic()
        self.stopped.set()
        with contextlib.suppress(RunnerError):  # Its runs continue, and a second signal ends them, too.
            self.status.stop()
        with contextlib.suppress(OSError):  # The terminal may be gone.
            os.write(2, b"stopping: what is in training writes a checkpoint first; once more to leave at once\n")

    def open(self, runs: object, total: int) -> SweepStatus:
        """Open the status of a sweep of ``total`` jobs, and print what happens until :meth:`close`.

        Args:
            runs: the folder of the runs, below which the status is kept.

        Raises:
            ConfigError: it names no folder.
            StorageError: the status cannot be written.
        """
        status = SweepStatus(folder_path("runs", runs) / SWEEPS / sweep_name())
        status.create()
        status.write_plan(total=total)
        self.status, self._monitor = status, Monitor(status, total)
        return status

    def expect(self, total: int) -> None:
        """Change how many jobs there will be, where that follows from those that are over."""
        if self._monitor is not None and self.status is not None and total != self._monitor.total:
            self._monitor.total = total
            self.status.write_plan(total=total)

    def pass_over_finished(self, jobs: Sequence[Mapping[str, Any] | None]) -> list[int]:
        """Update the status of every job whose run is finished, and plan the others; the places of those in ``jobs``.

        Args:
            jobs: the composed configuration of each; ``None`` of one that only its own process can compose.
        """
        assert self.status is not None
        first: dict[Path, int] = {}
        missing = []
        for job, composed in enumerate(jobs):
            folder = None if composed is None or self.stopped.is_set() else finished_before(composed)
            if folder is None:
                missing.append(job)
            else:
                keep(folder, self.status, job, first.setdefault(folder.path, job))
        places = ((job, jobs[job]) for job in missing)
        launched = [{"job": job, "place": composed and {key: composed[key] for key in PLACE if key in composed}}
                    for job, composed in places]  # fmt: skip
        models = list(map(_model, jobs))
        if self._monitor is not None:
            self._monitor.models = models
        self.status.write_plan(total=len(jobs), launched=launched, models=models)
        return missing

    def close(self) -> Outcome:
        """Print how the jobs ended and remove the status; of a sweep that never opened, no jobs."""
        if self.status is None or self._monitor is None:
            return Outcome(0, [], shown=True)
        entries = self._monitor.close()
        try:
            self.status.remove()
        except RunnerError as error:
            print_error(str(error))
        outcome = Outcome(self._monitor.total, entries, shown=self._monitor.problem is None)
        self.status = self._monitor = None
        return outcome


def _model(composed: Mapping[str, Any] | None) -> str | None:
    """The name of a job's model: jobs of one take about as long."""
    model = composed.get("model") if composed else None
    return str(model.get("name")) if isinstance(model, Mapping) else None
