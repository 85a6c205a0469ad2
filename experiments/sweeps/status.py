"""What the jobs of one sweep tell each other, through small files in a folder that lives as long as the sweep.

The jobs may run in the same process, in local workers or on other machines (basic, joblib, submitit): files in the
``runs`` folder reach them all. Each job posts what became of it; whoever started the sweep can ask all jobs to stop.
The folder is the runner's own, wherever Hydra or a launcher keep what is theirs.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from experiments.util import owned
from experiments.util.errors import RunnerError, writing
from experiments.util.files import read_json, write_json
from experiments.util.process_identity import is_alive

DONE = ("finished", "kept", "repeated", "planned", "made")
"""Statuses that leave nothing to do. ``kept`` was finished by an earlier sweep, ``repeated`` is the same run as another
of this sweep, ``planned`` was a dry run, and of ``made`` only the folder was wanted. The others are ``running``,
``failed``, ``refused`` (the configuration is wrong), ``busy`` (another sweep is at it), ``interrupted``, ``preempted``
(with a checkpoint of the very step) and ``waiting`` (not started before the sweep was stopped)."""

SWEEPS = ".sweeps"
"""The folder of the boards, below that of the runs."""
PURPOSE = "board of a sweep"
FILES = re.compile(r"owner\.json|going|job-\d+\.json|\.(owner|job-\d+)\.json\..+\.tmp|multirun\.yaml")
"""What lies on a board, with the file that Hydra writes for a sweep where it is given no other place."""
NAME = re.compile(r"\d{8}-\d{6}-\d+")


def sweep_name() -> str:
    """Of a sweep that this process starts now, different from all others of this machine."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


class Board:
    """The board in a folder; ``create`` makes it, in the process that starts the sweep."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._going = self.path / "going"
        self._owner: dict[str, Any] | None = None
        self._made: list[Path] = []

    def create(self) -> None:
        """Put the board up.

        Raises:
            StorageError: something is there already, or it cannot be written.
        """
        self._made = owned.make(self.path, PURPOSE)
        try:
            with writing(self._going):
                self._going.touch()
        except RunnerError:
            self.remove()
            raise

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
        """Ask every job to end: running ones are interrupted, others do not start.

        A file is taken away, which is possible on a full disk too.
        """
        with writing(self._going):
            self._going.unlink(missing_ok=True)

    def should_stop(self) -> bool:
        """Whether somebody asked to, the board was taken down, or the process that started the sweep is gone."""
        return not self._going.exists() or self.is_abandoned()

    def is_abandoned(self) -> bool:
        """Whether the process that started the sweep is gone; on another machine nobody can tell."""
        if self._owner is None:
            self._owner = owned.maker(self.path, PURPOSE)
        return self._owner is not None and not is_alive(self._owner)

    def owner(self) -> dict[str, Any] | None:
        """The process that started the sweep, ``None`` where there is no board, or none any more."""
        return owned.maker(self.path, PURPOSE)

    def remove(self) -> None:
        """Take the board down, in the process that put it up. What others left there stays, such as a launcher's logs.

        Raises:
            StorageError: it cannot be taken away.
        """
        if self._made:
            if self.owner() is not None:
                owned.remove(self.path, FILES)
            # An earlier sweep may have made the folder of boards, and left it to this one.
            boards = [self.path.parent] if self.path.parent.name == SWEEPS else []
            owned.remove_empty(list(dict.fromkeys([*self._made[:-1], *boards, self.path])))
            self._made = []
