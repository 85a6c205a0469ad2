"""How far a sweep is, and the time that is left."""

from __future__ import annotations

import time

import pytest

from experiments.runs.folder import RunFolder
from experiments.sweeps.remaining import Remaining, remaining, sweeps_below
from experiments.sweeps.status import SWEEPS, SweepStatus
from experiments.util.files import write_json
from tests.support.recorded import runs_command


def running(tmp_path, job: int, since: float, seconds_left: float | None) -> dict:
    folder = RunFolder(tmp_path / f"run-{job}")
    folder.path.mkdir()
    if seconds_left is not None:
        progress = {"step": 1, "steps": 9, "loss": 1.0, "tokens_per_second": 1.0, "seconds_left": seconds_left}
        write_json(folder.progress_file, progress)
    return {"job": job, "status": "running", "since": time.time() - since, "folder": str(folder.path)}


def ended(job: int, status: str, seconds: float) -> dict:
    return {"job": job, "status": status, "seconds": seconds}


def test_runs_take_as_long_as_those_that_were_measured(tmp_path):
    kept = [ended(0, "kept", 20.0), ended(1, "kept", 40.0)]
    assert remaining([], 4) == Remaining(0, 4, None)
    assert remaining(kept, 2) == Remaining(2, 2, None)
    assert remaining(kept, 4) == Remaining(2, 4, 60.0)
    # What this sweep has trained tells more, and a run that failed tells nothing.
    now = [*kept, ended(2, "finished", 100.0), ended(3, "failed", 1.0), ended(4, "repeated", 0.0)]
    assert remaining(now, 7) == Remaining(5, 7, 200.0)
    # Two at a time: one ends in 50 seconds, one in 100, as it has said nothing yet; each makes room for the next.
    now += [running(tmp_path, 5, 50.0, 90.0), running(tmp_path, 6, 0.0, None)]
    found = remaining(now, 9)
    assert (found.ended, found.total) == (5, 9)
    assert found.seconds == pytest.approx(200.0, abs=1)
    assert str(found).startswith("5 of 9 runs over, about 3:")


def test_those_in_training_are_all_that_is_known_at_first(tmp_path):
    now = [running(tmp_path, 0, 10.0, 30.0), running(tmp_path, 1, 20.0, 40.0)]
    assert remaining(now, 4).seconds == pytest.approx(30 + 50, abs=1)


def test_runs_of_a_model_take_as_long_as_those_of_that_model(tmp_path):
    now = [ended(0, "finished", 10.0), ended(1, "finished", 100.0)]
    assert remaining(now, 4, ["small", "large", "small", "small"]).seconds == pytest.approx(20.0)
    assert remaining(now, 4, ["small", "large", "large", "other"]).seconds == pytest.approx(100 + 55)


def test_the_list_of_runs_tells_of_sweeps_that_are_going_on(root, monkeypatch, capsys):
    sweep = SweepStatus(root / SWEEPS / "20260101-000000-1")
    sweep.create()
    sweep.update(0, **{key: value for key, value in ended(0, "finished", 90.0).items() if key != "job"}, name="n")
    assert sweeps_below(root) == {}  # It has not said how many runs there are.
    sweep.write_plan(total=3)
    for where in (root, root / "tiny"):
        _, shown, _ = runs_command(monkeypatch, capsys, "list", where)
        assert "sweep 20260101-000000-1: 1 of 3 runs over, about 3:00 left" in shown
    sweep.remove()
    assert sweeps_below(root) == {}
