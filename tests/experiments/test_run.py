"""The command line as a person uses it: real processes, few of them, since each takes seconds to start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import run
from experiments.config.overrides import compose, load
from experiments.runs.folder import RunFolder
from experiments.sweeps import workers
from experiments.sweeps.execute import resolve_composed
from experiments.sweeps.status import SweepStatus
from experiments.util.errors import RunnerError, StorageError
from tests.support.paths import ROOT
from tests.support.runs import TINY, command_line, train_for_sweep, until


def folders(runs: Path) -> dict[str, RunFolder]:
    """Run folders by ``model-seed``."""
    found = {RunFolder(path.parent): json.loads(path.read_text()) for path in runs.glob("*/*/config.json")}
    return {f"{config['model']['name']}-seed{config['seed']}": folder for folder, config in found.items()}


def test_a_failing_run_stops_no_other_and_nothing_is_done_twice(tmp_path, command_here, capfd):
    # The model is given twice, of which the last counts.
    sweep = ["--multirun", *TINY, "train.steps=10", "model=mamba2,gla", "model=attention", "train.grad_clip=0"]
    assert command_here(*sweep, "train.lr=1e30,1e-3") == 1
    shown, errors = capfd.readouterr()
    assert "2 runs: 1 failed, 1 finished" in shown
    assert "training diverged at step" in shown
    assert "Traceback" not in shown + errors
    found = [RunFolder(path.parent) for path in tmp_path.glob("runs/mqar/*/run.json")]
    assert sorted((folder.status(), folder.config().train.lr) for folder in found) == [
        ("failed", 1e30),
        ("finished", 1e-3),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mqar"]

    records = {folder.path: folder.run_file.read_bytes() for folder in found if folder.status() == "finished"}
    assert command_here(*sweep, "train.lr=1e-3") == 0
    assert "finished before" in capfd.readouterr().out
    assert {path: (path / "run.json").read_bytes() for path in records} == records


def test_only_what_is_missing_is_launched_and_folders_of_earlier_names_are_known(
    tmp_path, monkeypatch, command_here, capfd
):
    """A job keeps its place in the sweep, whatever is launched; and each combination of groups is composed once."""
    arguments = [*TINY, "task.length=16", "name=mine"]
    for seed in (0, 2):
        config = resolve_composed(compose([*arguments, f"seed={seed}"]))
        folder = RunFolder(config.folder().parent / f"attention-seed{seed}-{config.digest()[:10]}")
        folder.create(config)
        folder.update(status="finished", attempt=1, results={"test": 0.5}, metric={}, cost={"steps": 10})
    trained, composed = [], []
    monkeypatch.setattr(run, "load", lambda overrides: composed.append(overrides) or load(overrides))

    def trains(folder, config, sweep, job, retry, other_code, should_prune):
        trained.append((job, folder.path.name))
        return "finished", ""

    monkeypatch.setattr("experiments.sweeps.execute._finish", trains)
    for _ in range(2):  # The second sweep of a process is as the first.
        assert command_here("--multirun", *arguments, "train.lr=0.003,1e-4", "seed=0,1,2") == 0
    names = ["", *["lr1e-4-"] * 3] * 2
    assert [job for job, _ in trained] == [1, 3, 4, 5] * 2
    for (_, name), lr in zip(trained, names, strict=True):
        assert name.startswith(f"attention-{lr}d_model32-depth1-vocab_size16-")
    assert composed == [[], []]
    shown = capfd.readouterr().out
    assert "attention-seed0-" in shown
    assert shown.count("6 runs: 2 finished before, 4 finished") == 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mine"]


def test_one_run_is_found_where_its_task_has_its_folder(monkeypatch, command_here, capfd):
    arguments = ["task=parity", "task.length=16", "train.lr=1e-3"]
    folder = RunFolder((config := resolve_composed(compose(arguments))).folder())
    assert folder.path.parent == Path("runs/parity")
    monkeypatch.setattr("experiments.sweeps.execute._finish", lambda folder, *_: ("finished", str(folder.path)))
    assert command_here(*arguments) == 0
    assert f"{folder.path.name}: finished, {folder.path}" in capfd.readouterr().out
    folder.create(config)
    folder.update(status="finished", attempt=1, results={"test": 0.5}, metric={}, cost={"steps": 10})
    assert command_here(*arguments) == 0
    assert f"{folder.path.name}: finished before" in capfd.readouterr().out


@pytest.mark.slow
def test_ctrl_c_loses_nothing_and_the_same_command_resumes(tmp_path, monkeypatch, command_here, capfd):
    arguments = [*TINY, "train.steps=200", "seed=0,1,2", "launcher=joblib", "model=attention", "train.eval_every=50"]
    command = ["experiments.run", "--multirun", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = tmp_path / "runs"
    with open(tmp_path / "log", "w") as log:
        options = {"cwd": tmp_path, "env": environment, "stdout": log, "stderr": log}
        sweep = subprocess.Popen(command_line(*command), start_new_session=True, **options)
    try:
        # Memory runs out in the first run: it is killed, and the others continue.
        until(lambda: "attention-seed0" in folders(runs) and folders(runs)["attention-seed0"].lock.is_held())
        holder = json.loads(folders(runs)["attention-seed0"].lock.path.read_text())
        os.kill(holder["pid"], signal.SIGKILL)
        until(lambda: folders(runs).get("attention-seed1") and folders(runs)["attention-seed1"].status() == "finished")
        # As a terminal does it: the signal goes to every process of the sweep.
        os.killpg(sweep.pid, signal.SIGINT)
        assert sweep.wait(90) == 130
    finally:
        sweep.kill()
    shown = (tmp_path / "log").read_text()
    assert "ended by SIGKILL, perhaps because memory ran out" in shown
    assert "Traceback" not in shown
    assert "SIGKILL" in folders(runs)["attention-seed0"].record()["reason"]
    statuses = {name: folder.status() for name, folder in folders(runs).items()}
    assert statuses["attention-seed1"] == "finished"
    assert set(statuses.values()) <= {"finished", "failed", "interrupted", "preempted", None}
    assert not any(folder.lock.is_held() for folder in folders(runs).values())
    kept = folders(runs)["attention-seed1"].run_file.read_bytes()

    # In this process: workers and training processes are for the first part, and take seconds each to start.
    monkeypatch.setattr("experiments.sweeps.execute._train", train_for_sweep)
    assert command_here(*command[1:], "launcher=basic") == 0, capfd.readouterr()
    assert {folder.status() for folder in folders(runs).values()} == {"finished"}
    assert len(folders(runs)) == 3
    assert folders(runs)["attention-seed1"].run_file.read_bytes() == kept


def test_a_launcher_whose_workers_are_gone_is_one_clear_error(tmp_path, monkeypatch, command_here, capfd):
    def execute(composed, sweep, number, dry_run):
        sweep.update(number, status="running", name="n", folder=str(tmp_path))
        if number == 1:
            raise BrokenProcessPool

    monkeypatch.setattr(run, "execute", execute)
    assert command_here("--multirun", *TINY, "seed=0,1") == 1
    shown = capfd.readouterr()
    assert "error: a worker of the sweep was killed, perhaps because memory ran out: of 2 runs, 0 were" in shown.err
    assert "2 runs: 2 interrupted" in shown.out
    assert "Traceback" not in shown.out + shown.err


@pytest.mark.slow
def test_a_killed_worker_is_one_clear_error(tmp_path):
    arguments = [*TINY, "train.steps=100000", "seed=0,1,2", "launcher=joblib", "hydra.launcher.n_jobs=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        command = command_line("experiments.run", "--multirun", *arguments)
        options = {"cwd": tmp_path, "env": environment, "stdout": log, "stderr": log}
        sweep = subprocess.Popen(command, start_new_session=True, **options)
    try:
        until(lambda: len(folders(tmp_path / "runs")) == 2)
        until(lambda: all(folder.lock.is_held() for folder in folders(tmp_path / "runs").values()))
        folder = next(iter(folders(tmp_path / "runs").values()))
        training = json.loads(folder.lock.path.read_text())["pid"]
        worker = int(Path(f"/proc/{training}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(worker, signal.SIGKILL)
        assert sweep.wait(90) == 1
    finally:
        sweep.kill()
    shown = (tmp_path / "log").read_text()
    assert "error: a worker of the sweep was killed, perhaps because memory ran out: of 3 runs, 1 were" in shown
    assert "Traceback" not in shown
    until(lambda: not any(folder.lock.is_held() for folder in folders(tmp_path / "runs").values()))


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


def test_a_status_that_cannot_be_written_is_one_clear_error(monkeypatch, command_here, capfd):
    """The disk is full after the sweep began."""

    def full(self, job, **values):
        raise StorageError("cannot write job-0.json: No space left on device")

    monkeypatch.setattr(SweepStatus, "update", full)
    assert command_here(*TINY, "train.steps=5") == 1
    shown = capfd.readouterr()
    assert shown.err == "error: cannot write job-0.json: No space left on device\n"
    assert "Traceback" not in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lrr=1"], "error: train.lrr: unknown key, expected one of"),
        (["task=mqra"], "error: In 'config': Could not find 'task/mqra'"),
        (["launcher=job"], "error: In 'config': Could not find 'launcher/job'"),
        (["model=attention", "task=null"], "error: task=null: expected one of compositional_mqar, compression, "),
        (["runs=occupied"], "error: cannot write occupied/.sweeps"),
        (["--multirun", "train.lr=interval(0, 1)"], "experiments.search searches intervals"),
        (["--multirun", "launcher=submitit", "hydra.launcher.partition=none"], "error: launcher=submitit needs Slurm"),
    ],
)
def test_a_mistake_is_one_clear_error(tmp_path, monkeypatch, command_here, capfd, arguments, message):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "occupied").write_text("mine")
    assert command_here(*arguments) == 1
    shown = capfd.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.out + shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["occupied"] or not list(tmp_path.glob("runs/*/*"))
    assert (tmp_path / "occupied").read_text() == "mine"
