"""The command line as a person uses it: real processes, few of them, since each takes seconds to start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import run
from experiments.config.schema import FORMAT, MachineConfig, to_dict
from experiments.runs.folder import RunFolder
from experiments.sweeps import workers
from experiments.sweeps.execute import execute
from experiments.sweeps.session import SweepSession
from experiments.sweeps.status import SweepStatus
from experiments.util.errors import RunnerError, StorageError
from tests.support.paths import ROOT
from tests.support.runs import TINY, call, command_line, tiny_config, until


def folders(runs: Path) -> dict[str, RunFolder]:
    """Run folders by ``model-seed``."""
    found = [RunFolder(path.parent) for path in runs.glob("*/*/config.json")]
    return {folder.path.name.rpartition("-")[0]: folder for folder in found}


def test_a_failing_run_stops_no_other_and_nothing_is_done_twice(tmp_path):
    # The model is given twice, of which the last counts.
    sweep = ["experiments.run", "--multirun", *TINY, "train.steps=10", "launcher=joblib", "model=mamba2,gla"]
    sweep += ["model=attention"]
    first = call(*sweep, "train.lr=1e30,1e-3", "train.grad_clip=0", cwd=tmp_path)
    assert first.returncode == 1
    assert "2 runs: 1 failed, 1 finished" in first.stdout
    assert "training diverged at step" in first.stdout
    assert "Traceback" not in first.stdout + first.stderr
    found = [RunFolder(path.parent) for path in tmp_path.glob("runs/mqar/*/run.json")]
    assert sorted((folder.status(), folder.config().train.lr) for folder in found) == [
        ("failed", 1e30),
        ("finished", 1e-3),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mqar"]

    records = {folder.path: folder.run_file.read_bytes() for folder in found if folder.status() == "finished"}
    second = call(*sweep, "train.lr=1e-3", "train.grad_clip=0", cwd=tmp_path)
    assert second.returncode == 0
    assert "finished before" in second.stdout
    assert {path: (path / "run.json").read_bytes() for path in records} == records


def test_ctrl_c_loses_nothing_and_the_same_command_goes_on(tmp_path):
    arguments = [*TINY, "train.steps=200", "seed=0,1,2", "launcher=joblib", "model=attention", "train.eval_every=50"]
    command = ["experiments.run", "--multirun", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = tmp_path / "runs"
    with open(tmp_path / "log", "w") as log:
        options = {"cwd": tmp_path, "env": environment, "stdout": log, "stderr": log}
        sweep = subprocess.Popen(command_line(*command), start_new_session=True, **options)
    try:
        # Memory runs out in the first run: it is killed, and the others go on.
        until(lambda: "attention-seed0" in folders(runs) and folders(runs)["attention-seed0"].claim.is_held())
        claim = json.loads(folders(runs)["attention-seed0"].claim.path.read_text())
        os.kill(claim["pid"], signal.SIGKILL)
        until(lambda: folders(runs).get("attention-seed1") and folders(runs)["attention-seed1"].status() == "finished")
        # As a terminal does it: the signal goes to every process of the sweep.
        os.killpg(sweep.pid, signal.SIGINT)
        assert sweep.wait(40) == 130
    finally:
        sweep.kill()
    shown = (tmp_path / "log").read_text()
    assert "ended by SIGKILL, perhaps because memory ran out" in shown
    assert "Traceback" not in shown
    assert "SIGKILL" in folders(runs)["attention-seed0"].record()["reason"]
    statuses = {name: folder.status() for name, folder in folders(runs).items()}
    assert statuses["attention-seed1"] == "finished"
    assert set(statuses.values()) <= {"finished", "failed", "interrupted", "preempted", None}
    assert not any(folder.claim.is_held() for folder in folders(runs).values())
    kept = folders(runs)["attention-seed1"].run_file.read_bytes()

    done = call(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {folder.status() for folder in folders(runs).values()} == {"finished"}
    assert len(folders(runs)) == 3
    assert folders(runs)["attention-seed1"].run_file.read_bytes() == kept


def test_a_killed_worker_is_one_clear_error(tmp_path):
    arguments = [*TINY, "train.steps=100000", "seed=0,1,2", "launcher=joblib", "hydra.launcher.n_jobs=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        command = command_line("experiments.run", "--multirun", *arguments)
        options = {"cwd": tmp_path, "env": environment, "stdout": log, "stderr": log}
        sweep = subprocess.Popen(command, start_new_session=True, **options)
    try:
        until(lambda: len(folders(tmp_path / "runs")) == 2)
        until(lambda: all(folder.claim.is_held() for folder in folders(tmp_path / "runs").values()))
        folder = next(iter(folders(tmp_path / "runs").values()))
        training = json.loads(folder.claim.path.read_text())["pid"]
        worker = int(Path(f"/proc/{training}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(worker, signal.SIGKILL)
        assert sweep.wait(40) == 1
    finally:
        sweep.kill()
    shown = (tmp_path / "log").read_text()
    assert "error: a worker of the sweep was killed, perhaps because memory ran out: of 3 runs, 1 were" in shown
    assert "Traceback" not in shown
    until(lambda: not any(folder.claim.is_held() for folder in folders(tmp_path / "runs").values()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("full", [False, True])
def test_a_signal_stops_the_sweep_in_order(tmp_path, monkeypatch, capfd, number, full):
    """Also where the status cannot be written, and where it comes twice at once, from a terminal and passed on."""
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()

    def fail(self):
        raise StorageError("cannot write: No space left on device")

    session = SweepSession()
    session.status = sweep
    if full:
        monkeypatch.setattr(SweepStatus, "stop", fail)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may ignore it, as nohup does
    session.watch_signals()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert session.stopped.is_set()
    assert sweep.should_stop() is not full
    assert capfd.readouterr().err.startswith("stopping: what is in training writes a checkpoint first")


def test_nohup_is_respected(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    SweepSession().watch_signals()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_job_without_a_sweep_does_nothing(tmp_path, monkeypatch):
    """As one that a scheduler starts when the sweep is over: its status is gone."""
    monkeypatch.setattr(run.HydraConfig, "get", lambda: OmegaConf.create({"job": {"num": 0}}))
    monkeypatch.setattr(run, "execute", lambda *_, **__: pytest.fail("it began"))
    monkeypatch.setenv(workers.SWEEP, str(tmp_path / "gone"))
    with pytest.raises(RunnerError, match=r"there is none in .*gone: the sweep is over"):
        run.job(OmegaConf.create({}))
    monkeypatch.delenv(workers.SWEEP)
    with pytest.raises(RunnerError, match="SEQARCH_SWEEP is not set"):
        run.job(OmegaConf.create({}))


def test_a_status_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch, capfd):
    """The disk is full after the sweep began."""

    def full(self, job, **values):
        raise StorageError("cannot write job-0.json: No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SweepStatus, "update", full)
    monkeypatch.setattr("sys.argv", ["run", *TINY, "train.steps=5"])
    for name in ("SEQARCH_COMMAND", workers.SWEEP, "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "")
    assert run.main() == 1
    shown = capfd.readouterr()
    assert shown.err == "error: cannot write job-0.json: No space left on device\n"
    assert "Traceback" not in shown.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train.lrr=1"], "error: train.lrr: unknown key, expected one of"),
        (["task=mqra"], "Could not find 'task/mqra'"),
        (["launcher=job"], "Could not find 'launcher/job'"),
        (["model=attention", "task=null"], "error: task=null: expected one of compression, "),
        (["runs=occupied"], "error: cannot write occupied/.sweeps"),
        (["--multirun", "train.lr=interval(0, 1)"], "experiments.search searches intervals"),
        (["--multirun", "launcher=submitit", "hydra.launcher.partition=none"], "error: launcher=submitit needs Slurm"),
    ],
)
def test_a_mistake_is_one_clear_error(tmp_path, monkeypatch, arguments, told):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "occupied").write_text("mine")
    done = call("experiments.run", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["occupied"] or not list(tmp_path.glob("runs/*/*"))
    assert (tmp_path / "occupied").read_text() == "mine"


class TestJob:
    """One job, without Hydra and, where it is refused, without a training process."""

    def sweep(self, tmp_path) -> SweepStatus:
        sweep = SweepStatus(tmp_path / "sweep")
        sweep.create()
        return sweep

    def outcome(self, tmp_path, config) -> dict:
        sweep = self.sweep(tmp_path)
        execute(to_dict(config), sweep, 0)
        (entry,) = sweep.entries()
        return entry

    def test_a_folder_of_another_configuration_is_refused_untouched(self, tmp_path):
        config = tiny_config(tmp_path)
        config.folder().mkdir(parents=True)
        other = json.dumps({"format": FORMAT, **to_dict(tiny_config(tmp_path, train__lr=0.5))})
        (config.folder() / "config.json").write_text(other)
        entry = self.outcome(tmp_path, config)
        assert entry["status"] == "refused"
        assert "train.lr is 0.5 there, 0.001 wanted" in entry["message"]
        assert [path.name for path in config.folder().iterdir()] == ["config.json"]
        assert (config.folder() / "config.json").read_text() == other

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path):
        config = tiny_config(tmp_path)
        config.folder().parent.write_text("mine")
        entry = self.outcome(tmp_path, config)
        assert entry["status"] == "refused"
        assert str(config.folder()) in entry["message"]
        assert config.folder().parent.read_text() == "mine"

    def test_a_device_that_is_not_here_is_refused_before_anything_is_written(self, tmp_path, monkeypatch):
        """But a run that is finished is kept, wherever, and a folder for a torchrun elsewhere is made."""
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        config = tiny_config(tmp_path, train__device="cuda")
        entry = self.outcome(tmp_path, config)
        assert (entry["status"], entry["message"].partition(",")[0]) == ("refused", "train.device is 'cuda'")
        assert not config.folder().parent.exists()
        assert self.outcome(tmp_path, replace(config, machine=MachineConfig(processes=0)))["status"] == "made"
        RunFolder(config.folder()).update(status="finished", results={"test": 1.0})
        assert self.outcome(tmp_path, config)["status"] == "kept"

    def test_a_run_that_another_process_trains_is_left_to_it(self, tmp_path):
        config = tiny_config(tmp_path)
        folder = RunFolder(config.folder())
        folder.create(config)
        folder.claim.take()
        assert self.outcome(tmp_path, config)["status"] == "busy"
        assert folder.claim.is_held()

    def test_a_run_finished_without_results_is_not_taken_for_done(self, tmp_path):
        config = tiny_config(tmp_path)
        folder = RunFolder(config.folder())
        folder.create(config)
        folder.run_file.write_text(json.dumps({"format": FORMAT, "status": "finished"}))
        entry = self.outcome(tmp_path, config)
        assert entry["status"] == "refused"
        assert (
            f"cannot read {folder.run_file}: it says that the run is finished and holds no results" in entry["message"]
        )

    @pytest.mark.parametrize(
        ("record", "told"),
        [
            ({"status": 3}, "its status is 3"),
            ({"status": "failed", "attempt": "x"}, "its attempt is 'x'"),
            ({"status": "finished", "results": {"test": "x"}}, "holds no results"),
            ({"status": "finished", "results": {"test": 1}, "metric": 3}, "its metric is 3"),
        ],
    )
    def test_a_record_changed_by_hand_is_refused_with_its_path(self, tmp_path, record, told):
        config = tiny_config(tmp_path)
        folder = RunFolder(config.folder())
        folder.create(config)
        folder.run_file.write_text(json.dumps({"format": FORMAT, **record}))
        entry = self.outcome(tmp_path, config)
        assert entry["status"] == "refused"
        assert str(folder.run_file) in entry["message"]
        assert told in entry["message"]

    @pytest.mark.parametrize("first", [0, 1])
    def test_a_run_that_the_sweep_names_twice_is_trained_once(self, tmp_path, first):
        """Whichever of the two jobs begins first, and also while it is at it."""
        config, sweep = tiny_config(tmp_path), self.sweep(tmp_path)
        folder = RunFolder(config.folder())
        folder.create(config)
        sweep.update(first, status="running", name=folder.path.name, folder=str(folder.path))
        folder.claim.take()
        execute(to_dict(config), sweep, 1 - first)
        twin = next(entry for entry in sweep.entries() if entry["job"] == 1 - first)
        assert (twin["status"], twin["message"]) == ("repeated", f"as run {first + 1}")

    def test_a_failed_run_is_tried_again_on_request_and_shown_as_failed(self, tmp_path):
        config = tiny_config(tmp_path, train__lr=1e30, train__grad_clip=0.0)
        sweep = self.sweep(tmp_path)
        execute({**to_dict(config), "retry": 1}, sweep, 0)
        (entry,) = sweep.entries()
        assert entry["status"] == "failed"
        assert entry["message"].startswith("tried 2 times: training diverged")
        record = RunFolder(config.folder()).record()
        assert (record["status"], record["attempt"]) == ("failed", 2)

    @pytest.mark.parametrize("retry", [-1, "once", True, 0.5])
    def test_retries_are_a_number(self, tmp_path, retry):
        sweep = self.sweep(tmp_path)
        execute({**to_dict(tiny_config(tmp_path)), "retry": retry}, sweep, 0)
        (entry,) = sweep.entries()
        assert (entry["status"], entry["message"].partition(":")[0]) == ("refused", "retry")

    def test_no_job_begins_after_the_sweep_was_stopped(self, tmp_path):
        sweep = self.sweep(tmp_path)
        sweep.stop()
        execute(to_dict(tiny_config(tmp_path)), sweep, 0)
        assert [entry["status"] for entry in sweep.entries()] == ["waiting"]
        assert not tiny_config(tmp_path).folder().exists()

    def test_a_run_stopped_before_it_trains_is_preempted_at_once(self, tmp_path, monkeypatch):
        """As in a launcher's worker: the process inherits that SIGINT is ignored, and has no handlers yet."""
        config, sweep = tiny_config(tmp_path), self.sweep(tmp_path)
        popen = subprocess.Popen
        sleeper = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up'); time.sleep(60)"

        def sleeping(command, **options):
            threading.Timer(0.5, sweep.stop).start()
            return popen([command[0], "-c", sleeper], **options)

        folder = RunFolder(config.folder())
        folder.create(config)
        folder.update(status="failed", reason="of an earlier attempt", attempt=1)
        monkeypatch.setattr("experiments.sweeps.execute.subprocess.Popen", sleeping)
        started = time.monotonic()
        execute(to_dict(config), sweep, 0)
        assert time.monotonic() - started < 10
        (entry,) = sweep.entries()
        assert (entry["status"], entry["message"]) == ("preempted", "stopped from outside")
        assert (folder.status(), folder.record()["reason"]) == ("preempted", "stopped from outside")

    def test_a_process_that_cannot_write_is_told_with_the_path(self, tmp_path, monkeypatch):
        """The disk is full from the first byte: nothing can be recorded, so the job itself has to tell."""
        config = tiny_config(tmp_path)
        RunFolder(config.folder()).create(config)
        limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); import runpy, sys;"
        limited += "sys.argv[0] = 'train'; runpy.run_module('experiments.train', run_name='__main__')"
        popen = subprocess.Popen

        def starved(command, **options):
            return popen([command[0], "-c", limited, *command[command.index("experiments.train") + 1 :]], **options)

        monkeypatch.setattr("experiments.sweeps.execute.subprocess.Popen", starved)
        entry = self.outcome(tmp_path, config)
        assert entry["status"] == "failed"
        assert f"cannot write {config.folder()}" in entry["message"]
        assert "File too large" in entry["message"]
