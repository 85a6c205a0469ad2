"""Small runs: a configuration that trains in well under a second, in this process or through the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from experiments.config.build import resolve
from experiments.config.schema import RunConfig, run_config
from experiments.runs.folder import RunFolder
from experiments.training.checkpoints import Checkpoints
from experiments.training.loop import Run
from experiments.training.run_record import record_run
from seqarch.checkpoints.tensor_reader import TensorReader
from tests.support.paths import ROOT

TINY = [
    *("model.d_model=32", "model.depth=1"),
    *("task.vocab_size=16", "task.length=16", "task.pairs=2", "task.validation_examples=32", "task.test_examples=32"),
    *("train.batch_size=8", "train.threads=1", "train.target=null", "train.eval_every=5"),
]


def tiny_config(runs: Path, **changes) -> RunConfig:
    """A run of a tiny model; ``train__steps=3`` changes ``train.steps``."""
    plain = {
        "experiment": "tiny",
        "seed": 0,
        "runs": str(runs),
        "model": {"name": "attention", "pattern": "attention", "d_model": 32, "depth": 1, "channel": "none"},
        "task": {"name": "mqar", "vocab_size": 16, "length": 16, "pairs": 2}
        | {"validation_examples": 32, "test_examples": 32},
        "train": {"steps": 10, "batch_size": 8, "lr": 1e-3, "eval_every": 5, "threads": 1, "device": "cpu"},
    }
    for key, value in changes.items():
        *parts, last = key.split("__")
        target = plain
        for part in parts:
            target = target.setdefault(part, {})
        target[last] = value
    return resolve(run_config(plain))


@contextmanager
def handlers_as_before() -> Iterator[None]:
    """A run that is over ignores signals for good, which the processes that are started next would inherit."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_here(config: RunConfig) -> tuple[int, RunFolder]:
    """Train in this process; the exit code and the folder."""
    folder = RunFolder(config.folder())
    folder.create(config)
    folder.lock.acquire()
    try:
        with handlers_as_before():
            return record_run(folder, config, lambda: Run(config, folder)), folder
    finally:
        folder.leave()


def train_for_sweep(folder: RunFolder, config: RunConfig, *_: object) -> tuple[str, str]:
    """In place of ``experiments.sweeps.execute._train``, whose processes take seconds each to start."""
    train_here(config)
    return folder.status() or "failed", folder.record().get("reason", "")


def train_in_two_attempts(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, between: Callable[[], None], stop: int = 6
) -> tuple[int, RunFolder]:
    """The run, preempted before the step after ``stop``, and resumed after what happens between."""
    step = Run.step

    def preempted(run: Run) -> torch.Tensor:
        run.interrupts.requested = run.state.step == stop
        return step(run)

    monkeypatch.setattr(Run, "step", preempted)
    assert train_here(config)[0] == 75
    monkeypatch.setattr(Run, "step", step)
    between()
    return train_here(config)


def last(folder: RunFolder) -> Path:
    """The latest checkpoint."""
    return Checkpoints(folder.checkpoints, keep_last=1).newest_first()[0]


def tensors(path: Path, part: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, of the ``model``, the ``optimizer`` or everything."""
    reader = TensorReader(path)
    known = reader.read_metadata().state_dict_metadata.items()
    content = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in known}
    content = {name: tensor for name, tensor in content.items() if name.startswith(part)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(content, storage_reader=reader, no_dist=True)
    return content


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints hold the same bits."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def call(*arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    """Run a module as a person would, from an empty folder that must not be littered."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command_line(*arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, **options
    )


def until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    """Wait for it, and fail when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
