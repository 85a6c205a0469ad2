"""How far a sweep is, and the time that its runs still take, by those that were measured."""

from __future__ import annotations

import heapq
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.runs.folder import RunFolder
from experiments.sweeps.status import DONE, SWEEPS, SweepStatus
from experiments.util.errors import RunnerError
from experiments.util.files import read_json

FAILED = ("failed", "refused", "other_code", "begun_with_other_code")


@dataclass(frozen=True)
class Remaining:
    """What a sweep has done and what it still takes.

    Attributes:
        ended: jobs that need no more: done, or failed.
        total: all jobs.
        seconds: that the others take; ``None`` where no run was measured yet, or none is left.
    """

    ended: int
    total: int
    seconds: float | None

    def __str__(self) -> str:
        left = "" if self.seconds is None else f", about {format_duration(self.seconds)} left"
        return f"{self.ended} of {self.total} runs over{left}"


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def read_progress(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Where the training of a running job is; nothing before its first step."""
    try:
        return read_json(RunFolder(entry["folder"]).progress_file) or {}
    except RunnerError:
        return {}


def remaining(entries: Sequence[Mapping[str, Any]], total: int, models: Sequence[str | None] = ()) -> Remaining:
    """How far a sweep is.

    A run that has not begun takes as long as those of its model took, else as all did: those that this sweep trained,
    else those that were finished before, else those in training by what they expect. As many are trained at a time
    as are now, each beginning when one of these ends.

    Args:
        entries: the status of every job that has begun.
        models: the name of every job's model, as far as it is known.
    """
    counts = Counter(entry["status"] for entry in entries)
    ended = sum(counts[status] for status in (*DONE, *FAILED))
    model_of = dict(enumerate(models))
    running = [entry for entry in entries if entry["status"] == "running"]
    left = {entry["job"]: read_progress(entry).get("seconds_left") for entry in running}
    took = _measured(entries, left)
    begun = {entry["job"] for entry in entries}
    waiting = [model_of.get(job) for job in range(total) if job not in begun]
    if not took or not (running or waiting):
        return Remaining(ended, total, None)

    def expected(model: str | None) -> float:
        alike = [seconds for job, seconds in took.items() if model is not None and model_of.get(job) == model]
        return statistics.mean(alike or took.values())

    ends = [_left(entry, left[entry["job"]], expected(model_of.get(entry["job"]))) for entry in running] or [0.0]
    heapq.heapify(ends)
    for model in waiting:
        heapq.heapreplace(ends, ends[0] + expected(model))
    return Remaining(ended, total, max(ends))


def _measured(entries: Sequence[Mapping[str, Any]], left: Mapping[int, float | None]) -> dict[int, float]:
    """The seconds that runs took or, where none has ended, are expected to take, by job."""
    for status in ("finished", "kept"):
        if found := {e["job"]: e["seconds"] for e in entries if e["status"] == status and e.get("seconds")}:
            return found
    known = ((entry, left.get(entry["job"])) for entry in entries)
    return {entry["job"]: _elapsed(entry) + seconds for entry, seconds in known if seconds is not None}


def _left(entry: Mapping[str, Any], told: float | None, expected: float) -> float:
    """The seconds that a running job still takes: what it says, which is at most, or what runs like it took."""
    by_others = max(expected - _elapsed(entry), 0.0)
    return by_others if told is None else min(told, by_others) if by_others else told


def _elapsed(entry: Mapping[str, Any]) -> float:
    return max(time.time() - entry.get("since", time.time()), 0.0)


def of_sweep(sweep: SweepStatus) -> Remaining | None:
    """How far a sweep is that somebody else has started; ``None`` where its status is gone, or says nothing yet."""
    plan, entries = sweep.plan(), sweep.entries()
    return remaining(entries, plan["total"], plan.get("models", ())) if "total" in plan else None


def sweeps_below(root: Path) -> dict[str, Remaining]:
    """The sweeps whose runs are in a folder, or in one below it, and that are not over, by name."""
    folders = sorted({*root.glob(f"{SWEEPS}/*"), *root.parent.glob(f"{SWEEPS}/*")})
    going = ((path.name, SweepStatus(path)) for path in folders if path.is_dir())
    found = {name: of_sweep(sweep) for name, sweep in going if sweep.owner() is not None and not sweep.is_abandoned()}
    return {name: each for name, each in found.items() if each is not None}
