"""The status of a sweep's jobs, in small files of a folder that exists as long as the sweep.

The jobs may run in the same process, in local workers or on other machines (basic, joblib, submitit): files in the
``runs`` folder reach them all. Each job updates its own status; the process that started the sweep can ask all of them
to stop. The folder is the runner's own, wherever Hydra or a launcher keep what is theirs.
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
``failed``, ``refused`` (the configuration is wrong), ``other_code`` and ``begun_with_other_code`` (finished, or trained
to a checkpoint, with other sources of plug-ins), ``busy`` (another sweep trains it), ``interrupted``, ``preempted``
(with a checkpoint of the very step), ``pruned`` (ended by a search) and ``waiting`` (not started before the sweep was
stopped)."""

SWEEPS = ".sweeps"
"""The folder of the statuses of all sweeps, below that of the runs."""
PURPOSE = "board of a sweep"
"""In the marker of such a folder, by which those of earlier versions are known as well."""
FILES = re.compile(r"owner\.json|going|(plan|job-\d+)\.json|\.(owner|plan|job-\d+)\.json\..+\.tmp|multirun\.yaml")
"""The files of a sweep's status, with the one that Hydra writes for a sweep where it is given no other place."""
PLAN = "plan.json"
NAME = re.compile(r"\d{8}-\d{6}-\d+")


def sweep_name() -> str:
    """The name of a sweep that this process starts now, different from all others of this machine."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


class SweepStatus:
    """The status in a folder; :meth:`create` makes it, in the process that starts the sweep."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._going = self.path / "going"
        self._owner: dict[str, Any] | None = None
        self._made: list[Path] = []

    def create(self) -> None:
        """Make the folder.

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

    def update(self, job: int, **values: Any) -> None:
        """Replace the entry of a job: ``status`` and ``name``, perhaps ``folder`` and ``message``.

        Raises:
            StorageError: it cannot be written.
        """
        write_json(self.path / f"job-{job}.json", {"job": job, **values}, durable=False)

    def write_plan(self, **plan: Any) -> None:
        """Replace what all jobs are to know: their number, ``total``, and what :meth:`plan` is asked for besides.

        Raises:
            StorageError: it cannot be written.
        """
        write_json(self.path / PLAN, plan, durable=False)

    def plan(self) -> dict[str, Any]:
        """What was written last by :meth:`write_plan`; nothing before that, or where it cannot be read."""
        try:
            return read_json(self.path / PLAN) or {}
        except RunnerError:
            return {}

    def launched(self, number: int) -> dict[str, Any]:
        """Of the job that a launcher counts as ``number``: its place in the sweep, ``job``, and that of its run,
        ``place``; ``None`` for a run's whose place was not known when the sweep began.
        """
        launched = self.plan().get("launched", [])
        return launched[number] if number < len(launched) else {"job": number, "place": None}

    def entries(self) -> list[dict[str, Any]]:
        """The last entry of every job that has begun, in the order of the jobs."""
        found = []
        for path in self.path.glob("job-*.json"):
            try:
                found.append(read_json(path) or {})
            except RunnerError:
                continue  # Replaced as it was read; the next call will find it.
        return sorted((entry for entry in found if entry), key=lambda entry: entry["job"])

    def stop(self) -> None:
        """Ask every job to end: running ones are interrupted, others do not start.

        A file is removed, which is possible on a full disk, too.
        """
        with writing(self._going):
            self._going.unlink(missing_ok=True)

    def should_stop(self) -> bool:
        """Whether somebody asked to, the status was removed, or the process that started the sweep is gone."""
        return not self._going.exists() or self.is_abandoned()

    def is_abandoned(self) -> bool:
        """Whether the process that started the sweep is gone; on another machine nobody can know."""
        if self._owner is None:
            self._owner = owned.maker(self.path, PURPOSE)
        return self._owner is not None and not is_alive(self._owner)

    def owner(self) -> dict[str, Any] | None:
        """The process that started the sweep, ``None`` where there is no status, or none any more."""
        return owned.maker(self.path, PURPOSE)

    def remove(self) -> None:
        """Remove the folder, in the process that made it. What others left there stays, such as a launcher's logs.

        Raises:
            StorageError: it cannot be removed.
        """
        if self._made:
            if self.owner() is not None:
                owned.remove(self.path, FILES)
            # An earlier sweep may have made the folder of all sweeps, and left it to this one.
            sweeps = [self.path.parent] if self.path.parent.name == SWEEPS else []
            owned.remove_empty(list(dict.fromkeys([*self._made[:-1], *sweeps, self.path])))
            self._made = []
