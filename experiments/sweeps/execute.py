"""One job of a sweep: from the composed configuration to a finished run, in a process of its own."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from experiments.config.schema import RunConfig, run_config
from experiments.runs.folder import RunFolder
from experiments.sweeps.status import Board
from experiments.util.errors import ConfigError, RunnerError
from experiments.util.paths import ROOT
from experiments.util.secrecy import masked_text

POLL_SECONDS = 0.2
STOP_SECONDS = 15.0
"""How long an interrupted run may take to write its record before it is killed."""
TAIL_LINES = 12

Hopeless = Callable[[RunFolder], str | None]


def execute(composed: Mapping[str, Any], board: Board, job: int, hopeless: Hopeless | None = None) -> None:
    """Do the run of this configuration unless it is done, and post what became of it.

    Args:
        composed: the configuration and, beside it, ``retry``: how often a run that fails is tried again.
        hopeless: looks at a run's folder while it trains, and says why it should end or ``None``.
    """
    if board.should_stop():
        board.post(job, status="waiting", name=_name(composed))
        return
    try:
        retry, config = _retries(composed), resolve_composed(composed)
        folder = RunFolder(config.folder())
        if config.train.dry_run:
            board.post(job, status="planned", name=folder.path.name, message=_plan(config))
            return
        folder.check(config)
        posted = {"name": folder.path.name, "folder": str(folder.path)}
        board.post(job, status="running", **posted)
        status, message = _bring_about(folder, config, board, job, retry, hopeless)
        board.post(job, status=status, message=message, **posted)
    except RunnerError as error:
        board.post(job, status="refused", name=_name(composed), message=str(error))


def _bring_about(
    folder: RunFolder, config: RunConfig, board: Board, job: int, retry: int, hopeless: Hopeless | None
) -> tuple[str, str]:
    """The status that the run comes to, and a sentence on it.

    Raises:
        RunnerError: it cannot begin here, and nothing was written.
    """
    first = min([job, *(entry["job"] for entry in board.entries() if entry.get("folder") == str(folder.path))])
    if first < job:
        return "repeated", f"as run {first + 1}"
    if folder.status() == "finished":
        return "kept", _summary(folder)
    if folder.claim.stays_held(board.should_stop):
        return _taken(folder, board, job, "another sweep is training it")
    if folder.status() == "finished":  # Meanwhile, by whoever held it.
        return "kept", _summary(folder)
    if config.machine.processes:
        from experiments.training.engine import require_device  # Imports torch, as this job has by now.

        require_device(config.train.device)
    folder.create(config)
    if config.machine.processes == 0:
        return "made", f"torchrun ... -m experiments.train {folder.path}"
    status, message = _train(folder, config, board, hopeless)
    tried = 1
    while status == "failed" and tried <= retry and not board.should_stop():
        status, message = _train(folder, config, board, hopeless)
        tried += 1
    if status == "busy":
        return _taken(folder, board, job, message)
    return status, f"tried {tried} times: {message}" if status == "failed" and tried > 1 else message


def _taken(folder: RunFolder, board: Board, job: int, message: str) -> tuple[str, str]:
    """Who trains the run: another job of this sweep that is the same, or another sweep."""
    for entry in board.entries():
        if entry.get("folder") == str(folder.path) and entry["job"] != job:
            return "repeated", f"as run {entry['job'] + 1}"
    return "busy", message


def _retries(composed: Mapping[str, Any]) -> int:
    retry = composed.get("retry", 0)
    if type(retry) is not int or retry < 0:
        raise ConfigError(f"retry: expected how often a failed run is tried again, 0 or more, got {retry!r}")
    return retry


def resolve_composed(composed: Mapping[str, Any]) -> RunConfig:
    """The run's configuration, sure to build a model.

    Raises:
        ConfigError: naming the path of what is wrong in it.
    """
    config = run_config({key: value for key, value in composed.items() if key != "retry"})
    from experiments.config.build import resolve  # Imports torch, which a wrong key need not wait for.

    return resolve(config)


def _plan(config: RunConfig) -> str:
    from experiments.training.dry_run import plan  # Imports torch.

    return f"nothing was trained\n{plan(config)}"


def _train(folder: RunFolder, config: RunConfig, board: Board, hopeless: Hopeless | None) -> tuple[str, str]:
    """Run the training process to its end; its status and a sentence on it."""
    earlier = folder.record().get("attempt")
    training = ["-m", "experiments.train", str(folder.path), "--parent", str(os.getpid())]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.machine.processes)]
    process = subprocess.Popen(
        [sys.executable, "-u", *(torchrun if config.machine.processes > 1 else []), *training],
        env=_environment(config.train.threads),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        # Ctrl-C in a terminal reaches whoever started the sweep, who stops the runs one by one and in order.
        start_new_session=True,
    )
    assert process.stdout is not None
    tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
    drain = threading.Thread(target=_drain, args=(process.stdout, folder.log_file, tail), daemon=True)
    drain.start()
    try:
        stopped = _wait(process, board, folder, hopeless)
    finally:
        if process.poll() is None:
            process.kill()
    drain.join()
    return _outcome(folder, earlier, stopped, process.returncode, list(tail))


def _environment(threads: int) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if threads:
        environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    return environment


def _wait(process: subprocess.Popen[str], board: Board, folder: RunFolder, hopeless: Hopeless | None) -> str | None:
    """Until the process has ended; why it was asked to, ``None`` if it was not."""
    while True:
        try:
            process.wait(POLL_SECONDS)
            return None
        except subprocess.TimeoutExpired:
            reason = "stopped from outside" if board.should_stop() else hopeless and hopeless(folder)
            if not reason:
                continue
        # Not SIGINT: a launcher's worker ignores it, and so does its child until the child has set its own handlers.
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return reason


def _drain(output: IO[str], log_file: Path, tail: collections.deque[str]) -> None:
    """Copy what the process prints to its log, and keep the end of it even where the disk is full."""
    with output:
        for line in output:
            tail.append(line.rstrip("\n"))
            with contextlib.suppress(OSError), open(log_file, "a", encoding="utf-8") as log:
                log.write(line)


def _outcome(
    folder: RunFolder, earlier: int | None, stopped: str | None, code: int, tail: list[str]
) -> tuple[str, str]:
    """What the ended process left: its own record or, where it came to none, one written for it.

    Args:
        earlier: the attempt on record before the process began; its status tells nothing about this one.
        stopped: why the process was asked to end, ``None`` if it was not.
        code: with which the process ended, negative for a signal.
    """
    record = folder.record()
    status = record.get("status")
    if status == "finished":  # Whatever the exit code: by another sweep perhaps, while this process waited for it.
        return "finished", _summary(folder)
    if folder.claim.is_held():
        return "busy", "another sweep took it"
    last = tail[-1] if tail else "it printed nothing"
    if status not in ("failed", "interrupted", "preempted") or record.get("attempt") == earlier:
        # By SIGTERM itself only before the process could listen, and so before it had begun anything.
        status = "preempted" if code == -signal.SIGTERM else "interrupted" if stopped else "failed"
        record["reason"] = stopped or f"{_ending(code)}; its last line: {masked_text(last)}"
        # Where the disk is full this fails too, and the last line printed already says so.
        with contextlib.suppress(RunnerError):
            folder.update(status=status, reason=record["reason"])
    reason = record.get("reason", last)
    return status, "\n".join([reason, *(f"    {line}" for line in tail)]) if status == "failed" else reason


def _ending(code: int) -> str:
    if code >= 0:
        return f"the training process ended with exit code {code}"
    name = signal.Signals(-code).name
    guess = ", perhaps because memory ran out" if name == "SIGKILL" else ""
    return f"the training process was ended by {name}{guess}"


def _summary(folder: RunFolder) -> str:
    record = folder.record()
    results, metric, cost = record.get("results", {}), record.get("metric", {}), record.get("cost", {})
    name = str(metric.get("label", "metric")).lower()
    lost = record.get("metrics_lost", {}).get("lines")
    told = f"; {lost} lines of its metrics are lost" if lost else ""
    return f"test {name} {results['test']:.4g} after {cost.get('steps')} steps{told}"


def _name(composed: Mapping[str, Any]) -> str:
    model = composed.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    return f"{name or 'run'}-seed{composed.get('seed')}"
