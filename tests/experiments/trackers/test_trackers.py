from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import trackers
from experiments.config.schema import run_config, to_dict
from experiments.runs.folder import RunFolder
from experiments.trackers import Tracker, TrackerOptions, guarded
from experiments.trackers.tensorboard import TensorboardTracker
from experiments.trackers.wandb import WandbOptions, WandbTracker
from experiments.training.loop import Run
from experiments.util.errors import ConfigError
from tests.support.paths import ROOT
from tests.support.runs import TINY, command_line, tiny_config, train_here, until


@dataclass(frozen=True)
class BreakingOptions:
    at: str


class Breaking(Tracker):
    Config = BreakingOptions

    def __init__(self, options, folder, config):
        self.at, self.calls = options.at, 0
        self.helper = subprocess.Popen(["sleep", "100"]) if self.at == "hang" else None
        if self.at == "start":
            raise ConnectionError("no network")

    def log(self, step, values):
        self.calls += 1
        if self.at == "log":
            raise ConnectionError("no network")
        if self.helper:
            self.helper.wait()

    def finish(self, status, results):
        if self.at == "finish":
            raise ConnectionError("no network")


@pytest.mark.parametrize("at", ["start", "log", "finish"])
def test_a_failing_tracker_is_reported_once_and_stops_nothing(tmp_path, monkeypatch, capsys, at):
    monkeypatch.setitem(trackers.TRACKERS, "breaking", Breaking)
    config = tiny_config(tmp_path, tracker={"name": "breaking", "options": {"at": at}})
    code, folder = train_here(config)
    assert code == 0
    assert folder.status() == "finished"
    assert folder.record()["tracker_error"] == "ConnectionError: no network"
    assert capsys.readouterr().err.count("tracker breaking failed") == 1


def test_a_tracker_that_hangs_is_given_up_with_the_processes_it_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "breaking", Breaking)
    monkeypatch.setattr(guarded, "PATIENCE_SECONDS", 0.5)
    code, folder = train_here(tiny_config(tmp_path, tracker={"name": "breaking", "options": {"at": "hang"}}))
    assert code == 0
    assert len(folder.metrics()) == 2
    assert folder.record()["tracker_error"] == "no answer within 0.5 seconds"
    assert capsys.readouterr().err.count("tracker breaking failed") == 1
    assert not [pid for pid in guarded.children() if "sleep" in Path(f"/proc/{pid}/comm").read_text()]


@pytest.mark.slow
def test_training_outlives_wandb(tmp_path):
    """Its service is killed in the middle of a run."""
    command = command_line("experiments.run", *TINY, "train.steps=400", "tracker=wandb")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    until(lambda: any(tmp_path.glob("runs/*/*/metrics.jsonl")))
    (folder,) = [RunFolder(path.parent) for path in tmp_path.glob("runs/*/*/config.json")]
    training = json.loads(folder.lock.path.read_text())["pid"]
    started = guarded.children(training)
    (service,) = [pid for pid in started if "wandb" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(service, signal.SIGKILL)
    assert process.wait(100) == 0
    assert folder.status() == "finished"
    assert folder.record()["cost"]["steps"] == 400
    assert "Connection" in folder.record()["tracker_error"]
    assert folder.log_file.read_text().count("tracker wandb failed") == 1


def test_wandb_offline_hears_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = tiny_config(tmp_path, tracker={"name": "wandb", "options": {"tags": ["labelled"]}})
    code, folder = train_here(config)
    assert code == 0
    assert "tracker_error" not in folder.record()
    (recorded,) = folder.path.glob("wandb/offline-run-*/run-*.wandb")
    content = recorded.read_bytes()
    for expected in (b"validation_accuracy", b"labelled", b"attention", folder.path.name.encode()):
        assert expected in content


def test_wandb_has_one_run_for_all_attempts_and_no_step_twice(tmp_path, monkeypatch):
    """Preempted after step 7, where a checkpoint is, and killed after step 10 was logged and before its checkpoint."""
    config = tiny_config(tmp_path, tracker={"name": "wandb", "options": {}}, train__steps=15)
    sent, log = [], wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda run, values, step: (sent.append((run.id, step)), log(run, values, step))
    )
    with monkeypatch.context() as stopping:
        step = Run.step

        def stopped(run):
            if run.state.step == 7:
                run.preempt()
            return step(run)

        stopping.setattr(Run, "step", stopped)
        code, folder = train_here(config)
    assert (code, folder.status()) == (os.EX_TEMPFAIL, "preempted")
    tracker = WandbTracker(WandbOptions(), folder.path, to_dict(config))
    tracker.log(10, {"loss": 1.0})
    tracker.finish("interrupted", {})
    assert train_here(config)[0] == 0
    assert "tracker_error" not in folder.record()
    (name,) = {run for run, _ in sent}
    assert name.startswith(folder.path.name.rpartition("-")[2])
    assert [step for _, step in sent] == [5, 10, 15]
    assert {path.name.rpartition(f"-{name}")[1] for path in folder.path.glob("wandb/offline-run-*")} == {f"-{name}"}
    shutil.rmtree(folder.path)
    folder.create(config)
    WandbTracker(WandbOptions(), folder.path, to_dict(config)).finish("interrupted", {})
    assert json.loads((folder.path / "wandb" / "sent.json").read_text())["id"] != name


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that TensorBoard reads back: by name, steps and values."""
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_tensorboard_hears_of_the_run(tmp_path):
    code, folder = train_here(tiny_config(tmp_path, tracker__name="tensorboard"))
    assert code == 0
    assert "tracker_error" not in folder.record()
    found = events(folder.path)
    for name in ("loss", "validation_accuracy", "lr"):
        assert [step for step, _ in found[name]] == [5, 10]
        assert [value for _, value in found[name]] == pytest.approx([line[name] for line in folder.metrics()])
    assert found["results/test"] == [(10, pytest.approx(folder.record()["results"]["test"]))]


def test_tensorboard_shows_no_step_twice(tmp_path):
    """The second attempt does step 10 again, as after a process that was killed between two evaluations."""
    config = tiny_config(tmp_path, tracker__name="tensorboard")
    for steps in ((5, 10), (10, 15)):
        tracker = TensorboardTracker(TrackerOptions(), tmp_path, to_dict(config))
        for step in steps:
            tracker.log(step, {"loss": float(step)})
        tracker.finish("interrupted", {})
    assert events(tmp_path)["loss"] == [(5, 5.0), (10, 10.0), (15, 15.0)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else find(wanted))
    with pytest.raises(ConfigError, match=rf"'{name}' needs the package {name}, .*pip install {name}, or"):
        tiny_config(tmp_path, tracker__name=name)
    assert list(tmp_path.iterdir()) == []
    # what another machine recorded can be read all the same
    stored = to_dict(tiny_config(tmp_path)) | {"tracker": {"name": name, "options": {}}}
    assert run_config(stored).tracker.name == name
