"""Sweeps that are killed at any moment, run out of disk, or run twice at once: nothing is lost, torn or done twice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys

import pytest

from experiments.sweeps import workers
from tests.support.runs import TINY, until
from tests.support.sweeps import assert_whole, command_of, finished, folders, processes, repeat, send, started

SEEDS = ["experiments.run", "--multirun", *TINY, "train.steps=120", "train.eval_every=10", "seed=0,1"]
SWEEP = [*SEEDS, "model=attention,mamba2", "launcher=joblib"]


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_behind(tmp_path):
    """Workers of a launcher do not see that the sweep is gone; they end by themselves, and so do their runs."""
    with started(tmp_path, *SWEEP, "train.steps=100000") as sweep:
        until(lambda: sum(folder.lock.is_held() for folder in folders(tmp_path)) == 2)
        sweep.kill()
        sweep.wait()
        assert processes(tmp_path)
        # The runs themselves end as soon as their checkpoints are written.
        until(lambda: not any("loky" in command_of(pid) for pid in processes(tmp_path)), 5)
        until(lambda: not processes(tmp_path), 60)
    assert not any(folder.lock.is_held() for folder in folders(tmp_path))


WORKERS = """
import sys, time
from joblib import Parallel, delayed
from experiments.sweeps import workers

def work():
    with workers.at_work:
        print("at work", flush=True)
        time.sleep(60)

workers.watch_from_the_start()
Parallel(n_jobs=2, backend="loky")(delayed(time.sleep)(0) for _ in range(2))
print("between jobs", flush=True)
time.sleep(60) if sys.argv[1:] == ["idle"] else Parallel(n_jobs=2, backend="loky")(delayed(work)() for _ in range(2))
"""


@pytest.mark.parametrize("moment", ["as they begin", "between jobs", "at work"])
def test_workers_end_with_their_sweep(tmp_path, moment):
    """Nothing of the runner was called in them yet, nothing is called in them any more, or they wait for a run, which
    ends by itself (``training/test_train.py``).
    """
    own = [] if moment == "at work" else ["idle"]
    with started(tmp_path, *own, program=[sys.executable, "-c", WORKERS]) as sweep:
        if moment == "as they begin":
            until(lambda: len(processes(tmp_path)) >= 3)  # with a worker, or the process that cleans up after them
        else:
            until(lambda: moment in (tmp_path / "log").read_text())
        sweep.kill()
        sweep.wait()
        until(lambda: not processes(tmp_path), 5 + (workers.LEAVE_SECONDS if moment == "at work" else 0))


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
                send(pid, chance.choice([signal.SIGKILL, signal.SIGTERM]))
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
    with started(tmp_path, *sweep, program=[sys.executable, "-B", "-c", limited], output=subprocess.PIPE) as process:
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
