"""``run.json``: what a run was, what it used, what it cost and how it ended."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Protocol

import torch

from experiments import environment
from experiments.checkpoints import TrainState
from experiments.config import RunConfig
from experiments.errors import RunnerError
from experiments.files import write_atomic, write_json
from experiments.records import RunFolder
from experiments.tasks import Task
from experiments.trackers import Guarded, Tracker
from seqarch.models import LanguageModel
from seqarch.ops import record_backends

INTERRUPTED = 130
EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": INTERRUPTED}
FLOPS_FORMULA = (
    "3 x the forward FLOPs of the model's matrix products, convolutions and recurrences (two a multiply-add; the "
    "backward counts as two forwards) x training tokens; elementwise work and evaluation are not counted"
)


class Training(Protocol):
    """What the record needs of a run in training."""

    config: RunConfig
    device: torch.device
    task: Task
    model: LanguageModel
    state: TrainState
    tracker: Tracker

    def train(self) -> dict[str, Any]:
        """Train to the end and return the results."""
        ...

    def tokens_per_second(self) -> float: ...


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def keep_ledger(folder: RunFolder, config: RunConfig, make: Callable[[], Training]) -> int:
    """Train, with the record written before and after, however it ends; returns the exit code."""
    try:
        _open(folder, config)
        status, ending = _train(folder, make)
        folder.claim.check()  # The record is that of whoever took over.
        folder.update(status=status, ended=now(), **ending)
    except KeyboardInterrupt:
        return INTERRUPTED
    except RunnerError as error:  # Such as a full disk: what is written stands, and the exit code tells.
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CODES["failed"]
    if status != "finished":
        print(f"{status}: {ending['reason']}", file=sys.stderr, flush=True)
    return EXIT_CODES[status]


def _open(folder: RunFolder, config: RunConfig) -> None:
    code, diff = environment.code_version()
    if diff:
        write_atomic(folder.diff_file, diff)
    record = {
        "status": "running",
        "attempt": folder.record().get("attempt", 0) + 1,
        "name": folder.path.name,
        "experiment": config.experiment,
        "started": now(),
        "command": os.environ.get("SEQARCH_COMMAND", shlex.join(sys.argv)),
        "seeds": {"initialisation": config.seed, "training data": config.seed, "held-out data": 0},
        "code": {**code, "diff": folder.diff_file.name if diff else None},
        "environment": environment.software(),
    }
    write_json(folder.run_file, record)


def _train(folder: RunFolder, make: Callable[[], Training]) -> tuple[str, dict[str, Any]]:
    """How training ended, and what is to be recorded of it."""
    run, ending, status = None, {}, "failed"
    with record_backends() as backends:
        try:
            run = make()
            folder.update(**_describe(run))
            ending["results"] = run.train()
            status = "finished"
        except KeyboardInterrupt:
            status, ending["reason"] = "interrupted", "stopped from outside"
        except RunnerError as error:
            ending["reason"] = str(error)
        except Exception as error:  # A record of any failure; the whole of it goes to the log.
            traceback.print_exc()
            ending["reason"] = f"{type(error).__name__}: {error}"
    _ignore_interrupts()
    ending["backends"] = backends
    if run is not None:
        ending["cost"] = _cost(run)
        run.tracker.finish(status, ending.get("results", {}))
        if isinstance(run.tracker, Guarded) and run.tracker.error:
            ending["tracker_error"] = run.tracker.error
    return status, ending


def _describe(run: Training) -> dict[str, Any]:
    value, words = run.task.chance()
    return {
        "hardware": environment.hardware(run.device),
        "data": {"task": run.task.name, **run.task.manifest()},
        "task": {"title": run.task.title, "reading": run.task.reading},
        "metric": {**asdict(run.task.metric), "chance": value, "chance_label": words},
        "model": {
            "parameters": run.model.num_parameters(),
            "state_bytes": run.model.state_bytes(run.task.longest),
            "state_length": run.task.longest,
        },
    }


def _cost(run: Training) -> dict[str, Any]:
    config, steps = run.config.train, run.state.step
    cost = {
        "steps": steps,
        "tokens": steps * config.batch_size * run.task.length,
        "train_seconds": run.state.train_seconds,
        "eval_seconds": run.state.eval_seconds,
        "tokens_per_second": run.tokens_per_second(),
        "flops": 3 * run.model.flops(run.task.length, config.batch_size) * steps,
        "flops_formula": FLOPS_FORMULA,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if run.device.type == "cuda":
        cost["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(run.device)
    return cost


def _ignore_interrupts() -> None:
    """From here on the run is over: a second signal must not tear its record."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
