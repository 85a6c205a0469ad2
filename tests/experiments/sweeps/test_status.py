from __future__ import annotations

import json

from experiments.sweeps.status import SweepStatus


def test_entries_come_in_the_order_of_jobs(tmp_path):
    sweep = SweepStatus(tmp_path / ".sweeps" / "now")
    sweep.create()
    for job in (10, 2):
        sweep.update(job, status="running", name="n")
    sweep.update(10, status="finished", name="n")
    (sweep.path / "job-3.json").write_text("{")
    assert [(entry["job"], entry["status"]) for entry in sweep.entries()] == [(2, "running"), (10, "finished")]
    sweep.remove()
    assert list(tmp_path.iterdir()) == []


def test_jobs_stop_when_asked_or_when_the_sweep_is_gone(tmp_path, dead_pid):
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()
    assert not SweepStatus(sweep.path).should_stop()
    SweepStatus(sweep.path).stop()
    assert SweepStatus(sweep.path).should_stop()
    orphaned = SweepStatus(tmp_path / "orphaned")
    orphaned.create()
    marker = orphaned.path / "owner.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "pid": dead_pid}))
    assert orphaned.should_stop()
    sweep.remove()
    assert SweepStatus(sweep.path).should_stop(), "a job that begins after the sweep is over"


def test_a_launchers_logs_are_kept(tmp_path):
    sweep = SweepStatus(tmp_path / "now")
    sweep.create()
    (sweep.path / ".submitit").mkdir()
    sweep.remove()
    assert [path.name for path in sweep.path.iterdir()] == [".submitit"]
