"""``runs gc`` removes leftovers of processes that were killed and, on request, more; nothing of others."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from experiments.runs.folder import RunFolder
from experiments.runs.recorded import pick_run
from experiments.sweeps.status import SweepStatus
from experiments.util.process_identity import mark, process_identity
from tests.support.recorded import runs_command
from tests.support.runs import tiny_config, train_here


def make_litter(root: Path, dead_pid: int) -> list[Path]:
    """Make the leftovers of a killed sweep and killed training processes; their paths."""
    folder = pick_run(root, "seed0").folder
    gone = {**process_identity(os.getpid()), "started": "1"}
    abandoned = SweepStatus(root / ".sweeps" / "killed")
    abandoned.create()
    marker = abandoned.path / "owner.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "started": "1"}))
    folder.lock.path.write_text(json.dumps(gone))
    folder.progress_file.write_text("{}")
    aside = folder.path / ".run.json.12.tmp"
    aside.write_text("{")
    os.utime(aside, (time.time() - 7200,) * 2)
    half = folder.checkpoints / ".step-000015.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    pages = [root / below / f".index.md.{dead_pid}-1-{mark().rpartition('-')[2]}.tmp"
             for below in ("report", "results/small/length")]  # fmt: skip
    for page in pages:
        page.parent.mkdir(parents=True)
        page.write_text("half")
    return [abandoned.path, folder.lock.path, folder.progress_file, aside, half, *pages]


def test_only_leftovers_go_and_only_on_request(root, monkeypatch, capsys, dead_pid):
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    litter = make_litter(root, dead_pid)
    fresh = pick_run(root, "seed1").path / ".run.json.12.tmp"
    fresh.write_text("{")
    live = SweepStatus(root / ".sweeps" / "live")
    live.create()
    _, shown, _ = runs_command(monkeypatch, capsys, "gc", root)
    assert "7 can go" in shown
    assert all(str(path) in shown and path.exists() for path in litter)
    _, shown, _ = runs_command(monkeypatch, capsys, "gc", root, "--delete")
    assert "7 deleted" in shown
    assert not any(path.exists() for path in litter)
    assert fresh.exists()
    assert live.path.exists()
    assert {path: path.read_bytes() for path in before} == before


def test_checkpoints_and_failed_runs_go_when_asked_for(root, monkeypatch, capsys):
    failed, finished = pick_run(root, "seed2").folder, pick_run(root, "seed0").folder
    runs_command(monkeypatch, capsys, "gc", root, "--delete", "--checkpoints", "--failed")
    assert not failed.path.exists()
    assert not (finished.path / "checkpoints").exists()
    assert finished.status() == "finished"
    assert len(finished.metrics()) == 2


def test_what_others_made_stays(root, monkeypatch, capsys):
    """Notes in a run, a folder of another program with the same names in it, what a link leads to."""
    failed, finished = pick_run(root, "seed2").folder, pick_run(root, "seed0").folder
    (failed.path / "notes.txt").write_text("mine")
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "step-000001").write_text("mine")
    (finished.checkpoints / "mine").symlink_to(outside)
    foreign = root / "another-program"
    foreign.mkdir()
    for name in ("config.json", "progress.json", "claim.json", ".run.json.tmp", ".config.json.1.tmp"):
        (foreign / name).write_text('{"status": "failed"}')
        os.utime(foreign / name, (0, 0))
    (foreign / "run.json").write_text('{"status": "failed"}')
    sweep = SweepStatus(root / ".sweeps" / "now")
    sweep.create()
    (sweep.path / "owner.json").write_text(json.dumps({"pid": 1, "host": "x", "started": "1", "name": "other"}))
    (root / ".sweeps" / "linked").symlink_to(outside)
    shutil.rmtree(pick_run(root, "seed1").path)
    before = {path: path.is_dir() or path.read_bytes() for path in root.parent.rglob("*")}
    _, shown, _ = runs_command(monkeypatch, capsys, "gc", root, "--delete", "--checkpoints", "--failed")
    assert "stayed: it holds notes.txt, which the runner did not write; nothing was removed" in shown
    assert "stayed: it holds mine, which the runner did not write; nothing was removed" in shown
    assert {path: path.is_dir() or path.read_bytes() for path in root.parent.rglob("*")} == before


def test_a_run_with_everything_that_the_runner_writes_can_go(tmp_path, monkeypatch, capsys):
    """The names by which ``gc`` proves that a folder is a run's are those that are written."""
    config = tiny_config(
        tmp_path, tracker={"name": "tensorboard"}, train__steps=3, train__lr=1e30, train__grad_clip=0.0
    )
    code, folder = train_here(config)
    assert (code, folder.status()) == (1, "failed")
    assert folder.bad.is_dir()
    folder.log_file.write_text("as the process that started it does")
    runs_command(monkeypatch, capsys, "gc", tmp_path, "--delete", "--failed")
    assert not folder.path.exists()


def test_a_run_in_training_is_left_alone(root, monkeypatch, capsys):
    folder = pick_run(root, "seed2").folder
    folder.progress_file.write_text("{}")
    folder.lock.acquire()
    runs_command(monkeypatch, capsys, "gc", root, "--delete", "--failed", "--checkpoints")
    assert folder.progress_file.exists()
    assert folder.lock.is_own()


@pytest.mark.parametrize("case", [("seed2", "finished", "--failed"), ("seed0", "running", "--checkpoints")])
def test_a_run_that_ended_otherwise_meanwhile_stays(root, monkeypatch, capsys, case):
    """Between the listing and the removal: the status under the lock counts."""
    seed, status, option = case
    folder, acquire = pick_run(root, seed).folder, type(RunFolder(root).lock).acquire

    def meanwhile(lock, *arguments):
        folder.update(status=status, results={"test": 0.5})
        acquire(lock, *arguments)

    monkeypatch.setattr(type(folder.lock), "acquire", meanwhile)
    _, shown, _ = runs_command(monkeypatch, capsys, "gc", root, "--delete", option)
    assert f"stayed: the run is {status} by now" in shown
    assert (folder.status(), folder.checkpoints.exists()) == (status, True)


def test_a_run_that_is_taken_meanwhile_stays(root, monkeypatch, capsys):
    entry = pick_run(root, "seed2")
    other = RunFolder(entry.folder.path)
    monkeypatch.setattr(type(other.lock), "is_held", lambda self: False)
    other.lock.acquire()
    _, shown, _ = runs_command(monkeypatch, capsys, "gc", root, "--delete", "--failed")
    assert f"stayed: {other.path} is being trained by process {os.getpid()}" in shown
    assert "0 deleted" in shown
    assert other.run_file.exists()
