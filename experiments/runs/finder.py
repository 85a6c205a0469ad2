"""The runs below a folder, found and read anew each time.

There is no index to go stale: 1000 runs are found and read in less than a second (docs/log.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.runs.folder import RunFolder, flat
from experiments.util.errors import RunnerError, choices_hint
from experiments.util.files import read_json

NEVER_INSIDE = ("checkpoints", "wandb", "tensorboard", "report", ".sweeps")
"""Folders that hold no runs, and may hold very many files."""

STATUSES = ("finished", "failed", "running", "killed", "interrupted", "preempted", "damaged", "not started")
"""That a run can have, by what its folder tells."""


@dataclass(frozen=True)
class Unlisted:
    """A folder that cannot be listed, so that nobody knows which runs are below it."""

    path: Path
    problem: str


@dataclass(frozen=True)
class Entry:
    """A run as its folder tells it, or a folder that cannot be listed.

    Attributes:
        config, record: what ``config.json`` and ``run.json`` hold, as far as they can be read.
        problem: why something of it cannot be read; ``None`` where all can.
    """

    folder: RunFolder
    config: dict[str, Any]
    record: dict[str, Any]
    problem: str | None = None

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def status(self) -> str:
        """That of the record; ``killed`` where it says running and nobody is at work."""
        if self.problem is not None:
            return "damaged"
        status = self.record.get("status", "not started")
        return "killed" if status == "running" and not self.folder.claim.is_held() else status

    def get(self, path: str, otherwise: Any = None) -> Any:
        """The value at a dotted path such as ``config.train.lr`` or ``results.test``."""
        value: Any = {"config": self.config, **self.record}
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return otherwise
            value = value[key]
        return value

    def flat(self) -> dict[str, Any]:
        """All that is known, by dotted path."""
        found = {"experiment": self.config.get("experiment"), "run": self.name, "status": self.status}
        inner = {key: value for key, value in self.record.items() if key not in ("experiment", "name", "status")}
        return {**found, "problem": self.problem, **flat(self.config, "config"), **flat(inner)}


def find(root: Path) -> list[Entry]:
    """Every run at any depth below a folder, by path, and every folder there that cannot be listed.

    Raises:
        RunnerError: there is no such folder.
    """
    if not root.is_dir():
        raise RunnerError(f"{root} is no folder; give one that holds runs, such as runs or runs/mqar")
    return [_entry(found) for found in run_folders(root)]


def pick(root: Path, wanted: str) -> Entry:
    """The run of that path, name, or part of its name that no other run has.

    Raises:
        RunnerError: none or several fit.
    """
    if os.path.lexists(Path(wanted) / "config.json"):
        return _read(Path(wanted))
    found = run_folders(root) if root.is_dir() else []
    paths = [path for path in found if isinstance(path, Path)]
    exact = [path for path in paths if path.name == wanted]
    fitting = exact or [path for path in paths if wanted in path.name]
    if not fitting:
        hint = choices_hint(wanted, [path.name for path in paths]) if paths else "there are none"
        unlisted = "".join(f"\n    {each.problem}" for each in found if isinstance(each, Unlisted))
        raise RunnerError(f"no run below {root} is called {wanted!r}: {hint}{unlisted}")
    if len(fitting) > 1:
        shown = "".join(f"\n    {path}" for path in fitting[:10])
        raise RunnerError(f"{len(fitting)} runs below {root} are called {wanted!r}; give more of the name:{shown}")
    return _read(fitting[0])


def run_folders(root: Path) -> list[Path | Unlisted]:
    """Every folder at any depth that has a ``config.json``, of whatever kind, and every one that cannot be listed."""
    return sorted(_below(root), key=lambda found: found if isinstance(found, Path) else found.path)


def _below(folder: Path) -> Iterator[Path | Unlisted]:
    try:
        with os.scandir(folder) as entries:
            inner = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except OSError as error:
        yield Unlisted(folder, f"cannot read {folder}: {error.strerror}")
        return
    if "config.json" in inner:
        yield folder
        return
    for name, is_folder in inner.items():
        if is_folder and name not in NEVER_INSIDE:
            yield from _below(folder / name)


def _entry(found: Path | Unlisted) -> Entry:
    return _read(found) if isinstance(found, Path) else Entry(RunFolder(found.path), {}, {}, found.problem)


def _read(path: Path) -> Entry:
    folder, problems = RunFolder(path), []

    def read(get: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        try:
            return get() or {}
        except RunnerError as error:
            problems.append(str(error))
            return {}

    config, record = read(lambda: read_json(folder.config_file)), read(lambda: read_json(folder.run_file))
    if not problems:
        read(folder.record)
    return Entry(folder, config, record, "; ".join(problems) or None)
