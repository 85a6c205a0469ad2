"""One job of a sweep: from the composed configuration to a finished run, trained in a process of its own."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from experiments.config.convert import convert
from experiments.config.plugins import plugin_folders
from experiments.config.schema import OtherCode, RunConfig, run_config
from experiments.runs.folder import RunFolder, alone_in
from experiments.sweeps.status import SweepStatus
from experiments.util.devices import require_device
from experiments.util.errors import ConfigError, RunnerError
from experiments.util.paths import PLUGIN_PATH, python_environment
from experiments.util.secrecy import masked_text

POLL_SECONDS = 0.2
STOP_SECONDS = 15.0
"""The time that an interrupted run may take to write its record before it is killed."""
TAIL_LINES = 12

OF_SWEEP = ("retry", "other_code", "earlier")
"""Keys of a composed configuration that say what a sweep does, and are none of a run."""

COLOURS = ("FORCE_COLOR", "CLICOLOR_FORCE")
"""Environment variables by which programs colour what they print into a file, too."""

ShouldPrune = Callable[[RunFolder], str | None]
"""Asked while a run trains: why it should end, ``None`` while it should not."""

DryRun = Callable[[RunConfig], object]
"""Finds what a run would take, as an object whose text is for people."""


def execute(
    composed: Mapping[str, Any],
    sweep: SweepStatus,
    job: int,
    should_prune: ShouldPrune | None = None,
    dry_run: DryRun | None = None,
) -> None:
    """Do the run of this configuration unless it is done, and update the job's status.

    This is how a sweep resumes: the same command makes the same jobs, a run that is finished is kept, and the training
    process of one that was stopped resumes from its last checkpoint (``experiments/training/loop.py``, ``Run.resume``).

    Args:
        composed: the configuration and, beside it, ``retry``: how often a run that fails is tried again, and
            ``other_code``: what is done with a run that was trained with other code
            (``experiments/runs/other_code.py``); and where the place of the runs of these options has changed,
            ``earlier``: the experiment that they belonged to.
        dry_run: called in place of training where the configuration has ``train.dry_run``.
    """
    if sweep.should_stop():
        sweep.update(job, status="waiting", name=_name(composed))
        return
    try:
        retry, config = _retries(composed), resolve_composed(composed)
        other_code = convert(OtherCode, composed.get("other_code", "refuse"), "other_code")
        folder = RunFolder(config.folder())
        if config.train.dry_run:
            sweep.update(job, status="planned", name=folder.path.name, message=_plan(config, dry_run))
            return
        folder.check(config)
        run = {"name": folder.path.name, "folder": str(folder.path)}
        began = time.time()
        sweep.update(job, status="running", since=began, **run)
        status, message = _finish(folder, config, sweep, job, retry, other_code, should_prune)
        sweep.update(job, status=status, message=message, seconds=time.time() - began, **run)
    except RunnerError as error:
        sweep.update(job, status="refused", name=_name(composed), message=str(error))


def keep(folder: RunFolder, sweep: SweepStatus, job: int, first: int) -> None:
    """Update the status of a job whose run was finished before; ``first`` is the first job of the sweep with this run.

    Raises:
        RunnerError: its record cannot be read, or the status not be written.
    """
    kept = first == job
    status, message = ("kept", summary(folder)) if kept else ("repeated", f"as run {first + 1}")
    cost = folder.record().get("cost", {})
    seconds = cost.get("train_seconds", 0.0) + cost.get("eval_seconds", 0.0)
    run = {"name": folder.path.name, "folder": str(folder.path)}
    sweep.update(job, status=status, message=message, seconds=seconds, **run)


def _finish(
    folder: RunFolder,
    config: RunConfig,
    sweep: SweepStatus,
    job: int,
    retry: int,
    other_code: str,
    should_prune: ShouldPrune | None,
) -> tuple[str, str]:
    """The status in which the run ends, and a sentence on it.

    Raises:
        RunnerError: it cannot begin here, and nothing was written.
    """
    first = min([job, *(entry["job"] for entry in sweep.entries() if entry.get("folder") == str(folder.path))])
    if first < job:
        return "repeated", f"as run {first + 1}"
    if folder.status() != "finished" and folder.lock.stays_held(sweep.should_stop):
        return _taken(folder, sweep, job, "another sweep is training it")
    if folder.config_file.exists():  # Trained before, or meanwhile by whoever held it.
        from experiments.sweeps.trained_before import settle  # Imports torch, which is not needed for a new run here.

        if (settled := settle(folder, config, other_code)) is not None:
            status, found = settled
            ended = [summary(folder)] if folder.status() == "finished" else []
            return status, "; ".join([*ended, *([found] if found else [])])
    if config.machine.processes:
        require_device(config.train.device)
    with alone_in(folder.path.parent):
        there = config.folder()  # Perhaps another sweep has just made one, under a name that shows other options.
        if there == folder.path:
            folder.create(config)
    if there != folder.path:
        return _taken(RunFolder(there), sweep, job, "another sweep is training it")
    if config.machine.processes == 0:
        return "made", f"torchrun ... -m experiments.train {folder.path}"
    status, message = _train(folder, config, sweep, should_prune)  # What was begun with other code is to be resumed.
    tried = 1
    while status == "failed" and tried <= retry and not sweep.should_stop():
        status, message = _train(folder, config, sweep, should_prune)
        tried += 1
    if status == "busy":
        return _taken(folder, sweep, job, message)
    return status, f"tried {tried} times: {message}" if status == "failed" and tried > 1 else message


def _taken(folder: RunFolder, sweep: SweepStatus, job: int, message: str) -> tuple[str, str]:
    """The status of a run that is being trained already: by an equal job of this sweep, or by another sweep."""
    for entry in sweep.entries():
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
    from experiments.config.build import resolve  # Imports torch, which a wrong key need not wait for.

    return _where_it_is(resolve(_typed(composed)), composed)


def _typed(composed: Mapping[str, Any]) -> RunConfig:
    return run_config({key: value for key, value in composed.items() if key not in OF_SWEEP})


def _where_it_is(config: RunConfig, composed: Mapping[str, Any]) -> RunConfig:
    """The configuration in the experiment that has a folder of the run: its own, or the one that it belonged to."""
    earlier = composed.get("earlier")
    if earlier is None or config.is_there:
        return config
    there = replace(config, experiment=earlier)
    return there if there.is_there else config


def finished_before(composed: Mapping[str, Any]) -> RunFolder | None:
    """The folder of a run that is finished; ``None`` where it is not, or has to be looked at closely.

    Whether the configuration builds a model is not asked: it did.
    """
    from experiments.config.build import identified

    try:
        _retries(composed)
        config = _where_it_is(identified(_typed(composed)), composed)
        folder = RunFolder(config.folder())
        if config.train.dry_run or folder.status() != "finished":
            return None
        if composed.get("other_code") not in (None, "refuse", "keep") or folder.record().get("plugins"):
            return None
        folder.check(config)
    except RunnerError:
        return None
    return folder


def _plan(config: RunConfig, dry_run: DryRun | None) -> str:
    if dry_run is None:
        raise ConfigError("train.dry_run is for experiments.run")
    return f"nothing was trained\n{dry_run(config)}"


def _train(
    folder: RunFolder, config: RunConfig, sweep: SweepStatus, should_prune: ShouldPrune | None
) -> tuple[str, str]:
    """Run the training process to its end; its status and a sentence on it."""
    earlier = folder.record().get("attempt")
    training = ["-m", "experiments.train", str(folder.path), "--parent", str(os.getpid()), "--other-code=keep"]
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
        stopped = _wait(process, sweep, folder, should_prune)
    finally:
        if process.poll() is None:
            process.kill()
    drain.join()
    return _outcome(folder, earlier, stopped, process.returncode, list(tail))


def _environment(threads: int) -> dict[str, str]:
    """Of a training process, whose output is a log: no colours, and the folders of plug-ins."""
    environment = python_environment() | {PLUGIN_PATH: os.pathsep.join(plugin_folders()), "NO_COLOR": "1"}
    for name in COLOURS:
        environment.pop(name, None)
    if threads:
        environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    return environment


def _wait(
    process: subprocess.Popen[str], sweep: SweepStatus, folder: RunFolder, should_prune: ShouldPrune | None
) -> str | None:
    """Until the process has ended; why it was asked to, ``None`` if it was not."""
    while True:
        try:
            process.wait(POLL_SECONDS)
            return None
        except subprocess.TimeoutExpired:
            reason = "stopped from outside" if sweep.should_stop() else should_prune and should_prune(folder)
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
    """The status of an ended process and a sentence on it: by its own record or, where it wrote none, one written here.

    Args:
        earlier: the attempt on record before the process began, whose status is not that of this one.
        stopped: why the process was asked to end, ``None`` if it was not.
        code: with which the process ended, negative for a signal.
    """
    record = folder.record()
    status = record.get("status")
    if status == "finished":  # Whatever the exit code: by another sweep perhaps, while this process waited for it.
        return "finished", summary(folder)
    if folder.lock.is_held():
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


def summary(folder: RunFolder) -> str:
    record = folder.record()
    results, metric, cost = record.get("results", {}), record.get("metric", {}), record.get("cost", {})
    name = str(metric.get("label", "metric")).lower()
    lost = record.get("metrics_lost", {}).get("lines")
    losses = f"; {lost} lines of its metrics are lost" if lost else ""
    return f"test {name} {results['test']:.4g} after {cost.get('steps')} steps{losses}"


def _name(composed: Mapping[str, Any]) -> str:
    model = composed.get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    return f"{name or 'run'}-seed{composed.get('seed')}"
