"""Recorded runs: one form of a run that was recorded, and how those below a folder are found.

They are found and read anew each time. There is no index to become stale: 1000 runs are found and read in less than a
second (docs/log.md).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config.schema import flat
from experiments.runs.folder import RunFolder
from experiments.runs.former import FORMER
from experiments.util.errors import RunnerError, choices_hint
from experiments.util.files import read_json
from experiments.util.items import decode_items

NEVER_INSIDE = ("checkpoints", "wandb", "tensorboard", "report", ".sweeps", FORMER)
"""Folders that hold no runs, or those that others took the places of, and may hold very many files."""

STATUSES = ("finished", "failed", "running", "killed", "interrupted", "preempted", "damaged", "not started")
"""Statuses that a run can have, by what its folder holds."""


@dataclass(frozen=True)
class RecordedRun:
    """A run as its folder or a study's records hold it, or a folder that cannot be listed.

    Attributes:
        folder: of a run that was read from a study's records, the name alone.
        config, record: the content of ``config.json`` and ``run.json``, as far as they can be read.
        problem: why something of it cannot be read; ``None`` where all can.
        kept_metrics: those in a study's records; ``None`` where the folder has them.
    """

    folder: RunFolder
    config: dict[str, Any]
    record: dict[str, Any]
    problem: str | None = None
    kept_metrics: list[dict[str, Any]] | None = None

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, read when they are first asked for; errors as of ``RunFolder.metrics``."""
        return self.folder.metrics() if self.kept_metrics is None else self.kept_metrics

    @cached_property
    def lm_eval(self) -> list[dict[str, Any]]:
        """The lines of ``lm_eval.jsonl``, the oldest first; a study's records have none."""
        return self.folder.lm_eval() if self.kept_metrics is None else []

    @property
    def status(self) -> str:
        """The record's; ``killed`` where it says running and no process holds the lock."""
        if self.problem is not None:
            return "damaged"
        return (
            "killed" if self.recorded_status == "running" and not self.folder.lock.is_held() else self.recorded_status
        )

    @property
    def recorded_status(self) -> str:
        return self.record.get("status", "not started")

    @property
    def finished(self) -> bool:
        """Whether its results are there and are numbers."""
        return self.recorded_status == "finished" and not self._odd()

    @property
    def ending(self) -> str:
        """Its status, with the reason where it failed or its results are no numbers."""
        reason = f"its results are {self._odd()}" if self.recorded_status == "finished" else self.record.get("reason")
        return self.recorded_status + (f", {reason}" if reason else "")

    def _odd(self) -> dict[str, Any]:
        """The results that are no finite numbers: nothing follows from them, nor can they be drawn."""
        results = {name: self.record["results"].get(name) for name in ("test", "validation")}
        return {name: value for name, value in results.items() if not is_finite(value)}

    def result(self, name: str) -> float:
        """``test`` or ``validation``, of a finished run."""
        return self.record["results"][name]

    def items(self, split: str = "test") -> np.ndarray | None:
        """``[N]``, the metric of each sequence of a test split; ``None`` where the record has none.

        Records from before they were kept have none, nor do splits of very many sequences.

        Raises:
            RunnerError: what the record holds there is damaged.
        """
        text = self.get(f"results.tests.{split}.items") or (self.get("results.items") if split == "test" else None)
        try:
            return None if text is None else decode_items(text)
        except RunnerError as error:
            raise RunnerError(f"{self.path}: results of the split {split}: {error}") from error

    @property
    def device(self) -> str:
        """The name of the GPU or processor that it was trained on."""
        hardware = self.record["hardware"]
        return hardware.get("gpu", hardware["cpu"])

    @property
    def commit(self) -> str:
        """The commit that it was trained with, and whether files differed from it; the same of the plug-ins that its
        results depend on, each with a hash of its sources.
        """
        plugins = {name: entry for name, entry in self.record.get("plugins", {}).items() if "sources" in entry}
        own = [f"{name} {_commit(entry)} (sources {_digest(entry['sources'])})" for name, entry in plugins.items()]
        return ", ".join([_commit(self.record["code"]), *own])

    def get(self, path: str) -> Any:
        """The value at a dotted path such as ``config.train.lr`` or ``results.test``; ``None`` where there is none."""
        value: Any = {"config": self.config, **self.record}
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        return value

    def flat(self) -> dict[str, Any]:
        """All that is known, by dotted path, but for the scores of single sequences."""
        found = {"experiment": self.config.get("experiment"), "run": self.name, "status": self.status}
        inner = {key: value for key, value in self.record.items() if key not in ("experiment", "name", "status")}
        known = {**found, "problem": self.problem, **flat(self.config, "config"), **flat(inner)}
        return {path: value for path, value in known.items() if not is_items(path)}


def _commit(code: Mapping[str, Any]) -> str:
    if code.get("commit") is None and "version" in code:
        return f"version {code['version']}"
    return (code.get("commit") or "unknown")[:10] + (" with local changes" if code["dirty"] else "")


def _digest(sources: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()[:10]


def is_items(path: str) -> bool:
    """Whether a path of a record leads to the scores of single sequences, text that no table shows."""
    return path.startswith("results.") and path.endswith(".items")


def is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def find_runs(root: Path) -> list[RecordedRun]:
    """Every run at any depth below a folder, by path, and every folder there that cannot be listed.

    Raises:
        RunnerError: there is no such folder.
    """
    if not root.is_dir():
        raise RunnerError(f"{root} is no folder; give one that holds runs, such as runs or runs/mqar")
    return [_unlisted(path, problem) if problem else read_run(path) for path, problem in _folders(root)]


def pick_run(root: Path, wanted: str) -> RecordedRun:
    """The run of that path, name, or part of its name that no other run has.

    Raises:
        RunnerError: none or several fit.
    """
    if os.path.lexists(Path(wanted) / "config.json"):
        return read_run(Path(wanted))
    found = _folders(root) if root.is_dir() else []
    paths = [path for path, problem in found if problem is None]
    exact = [path for path in paths if path.name == wanted]
    fitting = exact or [path for path in paths if wanted in path.name]
    if not fitting:
        hint = choices_hint(wanted, [path.name for path in paths]) if paths else "there are none"
        unlisted = "".join(f"\n    {problem}" for _, problem in found if problem)
        raise RunnerError(f"no run below {root} is called {wanted!r}: {hint}{unlisted}")
    if len(fitting) > 1:
        names = "".join(f"\n    {path}" for path in fitting[:10])
        raise RunnerError(f"{len(fitting)} runs below {root} are called {wanted!r}; give more of the name:{names}")
    return read_run(fitting[0])


def read_run(path: Path) -> RecordedRun:
    """The run in a folder; what of it cannot be read is in its ``problem``."""
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
    return RecordedRun(folder, config, record, "; ".join(problems) or None)


def _unlisted(path: Path, problem: str) -> RecordedRun:
    return RecordedRun(RunFolder(path), {}, {}, problem)


def _folders(root: Path) -> list[tuple[Path, str | None]]:
    """Every folder at any depth that has a ``config.json``, of whatever kind, and with the reason every one that cannot
    be listed: nobody knows which runs are below it.
    """
    return sorted(_below(root), key=lambda found: found[0])


def _below(folder: Path) -> Iterator[tuple[Path, str | None]]:
    try:
        with os.scandir(folder) as entries:
            inner = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except OSError as error:
        yield folder, f"cannot read {folder}: {error.strerror}"
        return
    if "config.json" in inner:
        yield folder, None
        return
    for name, is_folder in inner.items():
        if is_folder and name not in NEVER_INSIDE:
            yield from _below(folder / name)
