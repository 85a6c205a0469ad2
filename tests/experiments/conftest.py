"""Fixtures of the runner's tests; :mod:`tests.support.runs` makes small runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments import run
from experiments.sweeps import workers
from experiments.tasks import TASKS, Task
from tests.support.runs import handlers_as_before, tiny_config, train_here
from tests.support.small_tasks import SMALL


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory) -> Iterator[Path]:
    """A folder of its own for the token files of text, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQARCH_TOKENS", str(tmp_path_factory.mktemp("tokens")))
        yield Path(os.environ["SEQARCH_TOKENS"])


@pytest.fixture(scope="session")
def tasks() -> dict[str, Task]:
    """Every task at a small size."""
    return {name: TASKS[name](config) for name, config in SMALL.items()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """Two finished runs that differ in the seed, and a failed one."""
    root = tmp_path_factory.mktemp("trained") / "runs"
    for changes in ({"seed": 0}, {"seed": 1}, {"seed": 2, "train__lr": 1e30, "train__grad_clip": 0.0}):
        train_here(tiny_config(root, train__steps=6, train__eval_every=3, **changes))
    return root


@pytest.fixture
def root(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture
def command_here(tmp_path, monkeypatch) -> Callable[..., int]:
    """The command in this process, from an empty folder, as if it were the first that the process does."""
    monkeypatch.chdir(tmp_path)
    for name in ("SEQARCH_COMMAND", workers.SWEEP, "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "")

    def command(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["run", *arguments])
        return run.main()

    return command


@pytest.fixture(autouse=True)
def _signal_handlers_as_before() -> Iterator[None]:
    with handlers_as_before():
        yield


@pytest.fixture
def dead_pid() -> int:
    """The number that a process had."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
