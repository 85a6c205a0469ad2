"""Sweeps as a person starts them, all of whose processes can be found, killed and waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.runs.folder import RunFolder
from tests.support.paths import ROOT
from tests.support.runs import command_line


@contextmanager
def started(
    cwd: Path, *arguments: str, program: list[str] | None = None, output: int | None = None
) -> Iterator[subprocess.Popen]:
    """A sweep in a session of its own, all of whose processes know ``cwd``; none of them is left in the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SWEEP_OF": str(cwd)}
    with open(cwd / "log", "a") as log:
        command = [*program, *arguments] if program else command_line(*arguments)
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output or log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pid in processes(cwd):
            send(pid, signal.SIGKILL)


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


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, unless it has ended meanwhile."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


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
        assert not folder.lock.path.exists()
        assert not list(folder.path.glob(".*.tmp"))
