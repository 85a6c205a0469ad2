"""What the runner's tests share; :mod:`tests.support.runs` makes small runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from experiments.tasks import TASKS, Task
from tests.support.runs import handlers_as_before
from tests.support.small_tasks import SMALL


@pytest.fixture(scope="session")
def tasks() -> dict[str, Task]:
    """Every task at a small size."""
    return {name: TASKS[name](config) for name, config in SMALL.items()}


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
