"""What the jobs of one sweep tell each other, through small files in a folder that lives as long as the sweep.

The jobs may run in the same process, in local workers or on other machines (basic, joblib, submitit): files in the
``runs`` folder reach them all. Each job posts what became of it; whoever started the sweep can ask all jobs to stop.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from experiments.claims import is_alive, process_identity
from experiments.errors import RunnerError, writing
from experiments.files import read_json, write_json

DONE = ("finished", "kept", "repeated", "planned", "made")
"""Statuses that leave nothing to do. ``kept`` was finished by an earlier sweep, ``repeated`` is the same run as another
of this sweep, ``planned`` was a dry run, and of ``made`` only the folder was wanted. The others are ``running``,
``failed``, ``refused`` (the configuration is wrong), ``busy`` (another sweep is at it), ``interrupted``, ``preempted``
(with a checkpoint of the very step) and ``waiting`` (not started before the sweep was stopped)."""


class Board:
    """The board in a folder; ``create`` makes it, in the process that starts the sweep."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._stop = self.path / "stop"
        self._owner: dict[str, Any] | None = None

    def create(self) -> None:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "owner.json", process_identity(os.getpid()))

    def post(self, job: int, **values: Any) -> None:
        write_json(self.path / f"job-{job}.json", {"job": job, **values})

    def entries(self) -> list[dict[str, Any]]:
        """What every job that has begun posted last, in the order of the jobs."""
        found = []
        for path in self.path.glob("job-*.json"):
            try:
                found.append(read_json(path) or {})
            except RunnerError:
                continue  # Replaced as it was read; the next look will find it.
        return sorted((entry for entry in found if entry), key=lambda entry: entry["job"])

    def stop(self) -> None:
        """Ask every job to end: running ones are interrupted, others do not start."""
        with writing(self._stop):
            self._stop.touch()

    def should_stop(self) -> bool:
        """Whether somebody asked to, or the process that started the sweep is gone."""
        return self._stop.exists() or self.is_abandoned()

    def is_abandoned(self) -> bool:
        """Whether the process that started the sweep is gone; on another machine nobody can tell."""
        if self._owner is None:
            self._owner = read_json(self.path / "owner.json")
        return self._owner is not None and not is_alive(self._owner)

    def remove(self) -> None:
        """Take the board down, unless a launcher keeps its own logs there."""
        if not (self.path / ".submitit").exists():
            shutil.rmtree(self.path, ignore_errors=True)
            if self.path.parent.name == ".sweeps" and self.path.parent.exists() and not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()
