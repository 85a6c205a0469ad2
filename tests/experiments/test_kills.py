"""Sweeps that are killed at any moment, run out of disk, or run twice at once: nothing is lost, torn or done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.records import RunFolder

from .conftest import ROOT, TINY, command_line, until

SEEDS = ["experiments.run", "--multirun", *TINY, "train.steps=120", "train.eval_every=10", "seed=0,1"]
SWEEP = [*SEEDS, "model=attention,mamba2", "launcher=joblib"]


@contextmanager
def started(
    cwd: Path, *arguments: str, program: list[str] | None = None, told: int | None = None
) -> Iterator[subprocess.Popen]:
    """A sweep in a session of its own, all of whose processes know ``cwd``; none of them is left in the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SWEEP_OF": str(cwd)}
    with open(cwd / "log", "a") as log:
        command = [*program, *arguments] if program else command_line(*arguments)
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=told or log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pid in processes(cwd):
            os.kill(pid, signal.SIGKILL)


def processes(cwd: Path) -> list[int]:
    """The processes of the sweep in a folder, by the variable that :func:`started` sets; ended ones are none."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                f"SWEEP_OF={cwd}\0".encode() in (path / "environ").read_bytes()
                and "\nState:\tZ" not in (path / "status").read_text()
            ):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def folders(cwd: Path) -> list[RunFolder]:
    return [RunFolder(path.parent) for path in sorted(cwd.glob("runs/*/*/config.json"))]


def finished(cwd: Path) -> dict[Path, bytes]:
    """The records of the finished runs."""
    return {each.path: each.run_file.read_bytes() for each in folders(cwd) if each.status() == "finished"}


def repeat(cwd: Path, *sweep: str) -> str:
    """The same command once more, undisturbed; what it shows."""
    (cwd / "log").rename(cwd / "log-before")
    with started(cwd, *sweep) as process:
        code = process.wait(280)
    shown = (cwd / "log").read_text()
    assert code == 0, shown
    assert "Traceback" not in shown
    return shown


def assert_whole(cwd: Path, runs: int, steps: int = 120, every: int = 10) -> None:
    """Every run is finished, and its metrics hold each evaluation once, in order and untorn."""
    assert len(finished(cwd)) == len(folders(cwd)) == runs
    for folder in folders(cwd):
        lines = folder.metrics_file.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(every, steps + 1, every))
        assert not folder.claim.path.exists()
        assert not list(folder.path.glob(".*.tmp"))


def test_a_killed_sweep_leaves_no_process_behind(tmp_path):
    """Workers of a launcher do not see that the sweep is gone; they end by themselves, and so do their runs."""
    with started(tmp_path, *SWEEP, "train.steps=100000") as sweep:
        until(lambda: sum(folder.claim.is_held() for folder in folders(tmp_path)) == 2)
        sweep.kill()
        sweep.wait()
        assert processes(tmp_path)
        # The runs themselves end as soon as their checkpoints are written.
        until(lambda: not any("loky" in command_of(pid) for pid in processes(tmp_path)), 5)
        until(lambda: not processes(tmp_path), 60)
    assert not any(folder.claim.is_held() for folder in folders(tmp_path))


IDLE = """
import time
from joblib import Parallel, delayed
from experiments import workers
workers.watch_from_the_start()
Parallel(n_jobs=2, backend="loky")(delayed(time.sleep)(0) for _ in range(2))
print("idle", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("moment", ["as they begin", "between jobs"])
def test_idle_workers_end_with_their_sweep(tmp_path, moment):
    """Nothing of the runner was called in them yet, or nothing is called in them any more."""
    with started(tmp_path, program=[sys.executable, "-c", IDLE]) as sweep:
        if moment == "as they begin":
            until(lambda: len(processes(tmp_path)) >= 3)  # with a worker, or the process that cleans up after them
        else:
            until(lambda: "idle" in (tmp_path / "log").read_text())
        sweep.kill()
        sweep.wait()
        until(lambda: not processes(tmp_path), 5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_one_repeat_completes_the_sweep(tmp_path, seed):
    chance = random.Random(seed)
    for _ in range(5):
        before = finished(tmp_path)
        with started(tmp_path, *SWEEP) as sweep:
            moment = chance.uniform(0.5, 12)
            until(lambda: bool(processes(tmp_path)))
            victims = []
            try:
                sweep.wait(moment)
            except subprocess.TimeoutExpired:
                victims = [sweep.pid] if chance.random() < 0.5 else processes(tmp_path)
            for pid in chance.sample(victims, min(2, len(victims))):
                try:
                    os.kill(pid, chance.choice([signal.SIGKILL, signal.SIGTERM]))
                except ProcessLookupError:
                    continue
            sweep.kill() if chance.random() < 0.5 else None
            sweep.wait(120)
            until(lambda: not processes(tmp_path), 60)
        after = finished(tmp_path)
        assert {path: after.get(path) for path in before} == before, "a finished run was run again"
    kept = finished(tmp_path)
    repeat(tmp_path, *SWEEP)
    assert_whole(tmp_path, runs=4)
    after = finished(tmp_path)
    assert {path: after[path] for path in kept} == kept


@pytest.mark.slow
@pytest.mark.parametrize("most", [100, 1500, 6000])
def test_after_a_full_disk_one_repeat_completes_the_sweep(tmp_path, most):
    """No file may grow beyond a bound: records, metrics or checkpoints cannot be written any more."""
    limited = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}));"
        "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    sweep = [*SEEDS, "model=attention", "launcher=basic"]
    with started(tmp_path, *sweep, program=[sys.executable, "-B", "-c", limited], told=subprocess.PIPE) as process:
        shown = process.communicate(timeout=280)[0].decode()  # a pipe, as no file could hold it
        assert process.returncode == 1
    assert "error: cannot write" in shown or "failed, cannot write" in shown
    assert "Traceback" not in shown
    repeat(tmp_path, *sweep)
    assert_whole(tmp_path, runs=2)


@pytest.mark.slow
def test_two_sweeps_at_once_train_each_run_once(tmp_path):
    with started(tmp_path, *SWEEP) as one, started(tmp_path, *SWEEP) as other:
        codes = [one.wait(280), other.wait(280)]
    assert set(codes) <= {0, 1}
    assert_whole(tmp_path, runs=4)
    assert all(folder.record()["attempt"] == 1 for folder in folders(tmp_path))
    assert all(folder.log_file.read_text().count("step 10 ") == 1 for folder in folders(tmp_path))
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert "4 finished before" in repeat(tmp_path, *SWEEP)


@pytest.mark.slow
def test_a_sweep_through_submitit(tmp_path):
    """Its local executor: the jobs are processes that are started, watched and answered as those of a cluster."""
    sweep = [*SEEDS, "model=attention", "launcher=submitit_local"]
    with started(tmp_path, *sweep) as process:
        assert process.wait(280) == 0
    assert_whole(tmp_path, runs=2)
    before = finished(tmp_path)
    assert "2 runs: 2 finished before" in repeat(tmp_path, *sweep)
    assert finished(tmp_path) == before
