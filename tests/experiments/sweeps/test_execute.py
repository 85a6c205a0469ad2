"""One job of a sweep, without Hydra and, where it is refused, without a training process."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from experiments.config.schema import FORMAT, MachineConfig, to_dict
from experiments.runs.folder import RunFolder
from experiments.sweeps.execute import execute, finished_before
from experiments.sweeps.status import SweepStatus
from tests.support.runs import tiny_config, train_for_sweep


def new_sweep(tmp_path) -> SweepStatus:
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()
    return sweep


def outcome(tmp_path, config) -> dict:
    sweep = new_sweep(tmp_path)
    execute(to_dict(config), sweep, 0)
    (entry,) = sweep.entries()
    return entry


def test_a_folder_of_another_configuration_is_refused_untouched(tmp_path):
    config = tiny_config(tmp_path)
    config.folder().mkdir(parents=True)
    other = json.dumps({"format": FORMAT, **to_dict(tiny_config(tmp_path, train__lr=0.5))})
    (config.folder() / "config.json").write_text(other)
    entry = outcome(tmp_path, config)
    assert entry["status"] == "refused"
    assert "train.lr is 0.5 there, 0.001 wanted" in entry["message"]
    assert [path.name for path in config.folder().iterdir()] == ["config.json"]
    assert (config.folder() / "config.json").read_text() == other


def test_a_run_that_is_finished_elsewhere_is_not_trained_again(tmp_path):
    """Where ``task=`` alone had put it: into the folder of the experiment whose task it is not."""
    there, here = tiny_config(tmp_path, experiment="mqar"), tiny_config(tmp_path, experiment="needle")
    folder = RunFolder(there.folder())
    folder.create(there)
    folder.update(status="finished", attempt=1, results={"test": 0.5}, metric={}, cost={"steps": 10})
    composed = {**to_dict(here), "earlier": "mqar", "shown": {"train.lr": 1e-3}}
    assert finished_before(composed).path == folder.path
    sweep = new_sweep(tmp_path)
    execute(composed, sweep, 0)
    assert [(entry["status"], entry["folder"]) for entry in sweep.entries()] == [("kept", str(folder.path))]
    assert not here.folder().parent.exists()
    assert finished_before({**composed, "earlier": None}) is None
    assert finished_before({**composed, "train": {**composed["train"], "lr": "much"}}) is None
    folder.update(status="failed")
    assert finished_before(composed) is None


def test_a_folder_that_another_sweep_makes_under_another_name_is_its_own(tmp_path, monkeypatch):
    """It comes into being between the look and the making."""
    config = tiny_config(tmp_path)
    other = RunFolder(config.folder().parent / f"attention-depth1-seed0-{config.digest()[:6]}")
    monkeypatch.setattr("experiments.sweeps.execute.require_device", lambda _: other.create(config))
    entry = outcome(tmp_path, config)
    assert (entry["status"], entry["message"]) == ("busy", "another sweep is training it")
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == [other.path.name]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    config = tiny_config(tmp_path)
    config.folder().parent.write_text("mine")
    entry = outcome(tmp_path, config)
    assert entry["status"] == "refused"
    assert str(config.folder()) in entry["message"]
    assert config.folder().parent.read_text() == "mine"


def test_a_device_that_is_not_here_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """But a run that is finished is kept, wherever, and a folder for a torchrun elsewhere is made."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = tiny_config(tmp_path, train__device="cuda")
    entry = outcome(tmp_path, config)
    assert (entry["status"], entry["message"].partition(",")[0]) == ("refused", "train.device is 'cuda'")
    assert not config.folder().parent.exists()
    assert outcome(tmp_path, replace(config, machine=MachineConfig(processes=0)))["status"] == "made"
    RunFolder(config.folder()).update(status="finished", results={"test": 1.0})
    assert outcome(tmp_path, config)["status"] == "kept"


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path):
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    folder.lock.acquire()
    assert outcome(tmp_path, config)["status"] == "busy"
    assert folder.lock.is_held()


def test_a_run_finished_without_results_is_not_taken_for_done(tmp_path):
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    folder.run_file.write_text(json.dumps({"format": FORMAT, "status": "finished"}))
    entry = outcome(tmp_path, config)
    assert entry["status"] == "refused"
    assert f"cannot read {folder.run_file}: it says that the run is finished and holds no results" in entry["message"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"status": 3}, "its status is 3"),
        ({"status": "failed", "attempt": "x"}, "its attempt is 'x'"),
        ({"status": "finished", "results": {"test": "x"}}, "holds no results"),
        ({"status": "finished", "results": {"test": 1}, "metric": 3}, "its metric is 3"),
    ],
)
def test_a_record_changed_by_hand_is_refused_with_its_path(tmp_path, record, message):
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    folder.run_file.write_text(json.dumps({"format": FORMAT, **record}))
    entry = outcome(tmp_path, config)
    assert entry["status"] == "refused"
    assert str(folder.run_file) in entry["message"]
    assert message in entry["message"]


@pytest.mark.parametrize("first", [0, 1])
def test_a_run_that_the_sweep_names_twice_is_trained_once(tmp_path, first):
    """Whichever of the two jobs begins first, and also while it is at it."""
    config, sweep = tiny_config(tmp_path), new_sweep(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    sweep.update(first, status="running", name=folder.path.name, folder=str(folder.path))
    folder.lock.acquire()
    execute(to_dict(config), sweep, 1 - first)
    twin = next(entry for entry in sweep.entries() if entry["job"] == 1 - first)
    assert (twin["status"], twin["message"]) == ("repeated", f"as run {first + 1}")


def test_a_failed_run_is_tried_again_on_request_and_shown_as_failed(tmp_path, monkeypatch):
    """Trained here: that a training process that fails is reported is for the sweeps of ``test_run.py``."""
    monkeypatch.setattr("experiments.sweeps.execute._train", train_for_sweep)
    config = tiny_config(tmp_path, train__lr=1e30, train__grad_clip=0.0)
    sweep = new_sweep(tmp_path)
    execute({**to_dict(config), "retry": 1}, sweep, 0)
    (entry,) = sweep.entries()
    assert entry["status"] == "failed"
    assert entry["message"].startswith("tried 2 times: training diverged")
    record = RunFolder(config.folder()).record()
    assert (record["status"], record["attempt"]) == ("failed", 2)


@pytest.mark.parametrize("retry", [-1, "once", True, 0.5])
def test_retries_are_a_number(tmp_path, retry):
    sweep = new_sweep(tmp_path)
    execute({**to_dict(tiny_config(tmp_path)), "retry": retry}, sweep, 0)
    (entry,) = sweep.entries()
    assert (entry["status"], entry["message"].partition(":")[0]) == ("refused", "retry")


def test_no_job_begins_after_the_sweep_was_stopped(tmp_path):
    sweep = new_sweep(tmp_path)
    sweep.stop()
    execute(to_dict(tiny_config(tmp_path)), sweep, 0)
    assert [entry["status"] for entry in sweep.entries()] == ["waiting"]
    assert not tiny_config(tmp_path).folder().exists()


def test_the_log_of_a_run_has_no_colours(tmp_path, monkeypatch):
    """Whatever the environment of the sweep asks for, the process of a run prints into a file."""
    names = ("FORCE_COLOR", "CLICOLOR_FORCE", "NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    popen, printing = subprocess.Popen, f"import os; print([os.environ.get(name) for name in {names}])"
    monkeypatch.setattr(
        "experiments.sweeps.execute.subprocess.Popen",
        lambda command, **options: popen([command[0], "-c", printing], **options),
    )
    config = tiny_config(tmp_path)
    execute(to_dict(config), new_sweep(tmp_path), 0)
    assert RunFolder(config.folder()).log_file.read_text() == "[None, None, '1']\n"


def test_a_run_stopped_before_it_trains_is_preempted_at_once(tmp_path, monkeypatch):
    """As in a launcher's worker: the process inherits that SIGINT is ignored, and has no handlers yet."""
    config, sweep = tiny_config(tmp_path), new_sweep(tmp_path)
    popen = subprocess.Popen
    sleeper = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up'); time.sleep(200)"

    def sleeping(command, **options):
        threading.Timer(0.5, sweep.stop).start()
        return popen([command[0], "-c", sleeper], **options)

    folder = RunFolder(config.folder())
    folder.create(config)
    folder.update(status="failed", reason="of an earlier attempt", attempt=1)
    monkeypatch.setattr("experiments.sweeps.execute.subprocess.Popen", sleeping)
    monkeypatch.setattr("experiments.sweeps.execute.STOP_SECONDS", 100.0)
    started = time.monotonic()
    execute(to_dict(config), sweep, 0)
    assert time.monotonic() - started < 60  # it is neither killed nor waited for
    (entry,) = sweep.entries()
    assert (entry["status"], entry["message"]) == ("preempted", "stopped from outside")
    assert (folder.status(), folder.record()["reason"]) == ("preempted", "stopped from outside")


def test_a_process_that_cannot_write_is_reported_with_the_path(tmp_path, monkeypatch):
    """The disk is full from the first byte: nothing can be recorded, so the job itself has to report it."""
    config = tiny_config(tmp_path)
    RunFolder(config.folder()).create(config)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); import runpy, sys;"
    limited += "sys.argv[0] = 'train'; runpy.run_module('experiments.train', run_name='__main__')"
    popen = subprocess.Popen

    def starved(command, **options):
        return popen([command[0], "-c", limited, *command[command.index("experiments.train") + 1 :]], **options)

    monkeypatch.setattr("experiments.sweeps.execute.subprocess.Popen", starved)
    entry = outcome(tmp_path, config)
    assert entry["status"] == "failed"
    assert f"cannot write {config.folder()}" in entry["message"]
    assert "File too large" in entry["message"]
