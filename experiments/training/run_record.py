"""The record of a run, ``run.json``: what it was, what it used, what it cost and how it ended."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.config.schema import FORMAT, RunConfig, TrainConfig
from experiments.runs.folder import RunFolder
from experiments.runs.other_code import difference, has_begun, own_sources, plugin_records
from experiments.tasks import TaskError
from experiments.trackers import Guarded
from experiments.training import processes
from experiments.training.cost_meter import measured_peak, peak_memory, price, utilisation
from experiments.training.loop import Run
from experiments.util import environment
from experiments.util.errors import RunnerError, writing
from experiments.util.file_lists import listed_changes
from experiments.util.files import write_atomic, write_json
from experiments.util.interrupts import INTERRUPTED, INTERRUPTS, Preempted
from experiments.util.secrecy import masked, masked_command
from seqarch.ops import record_backends

EXIT_CODES = {"finished": 0, "failed": 1, "preempted": os.EX_TEMPFAIL, "interrupted": INTERRUPTED}
"""``EX_TEMPFAIL`` is 75, by which sysexits.h says: try again later."""

FLOPS_FORMULA = (
    "3 x the forward FLOPs of the model's matrix products, convolutions and recurrences (two per multiply-add; the "
    "backward counts as two forwards) x training tokens; elementwise work and evaluation are not counted"
)

DATA_FILES = "data_files.txt"

EXPECTED = (RunnerError, TaskError)
"""Errors that a person can put right: recorded and shown as one line."""


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def record_run(folder: RunFolder, config: RunConfig, make: Callable[[], Run]) -> int:
    """Train, with the record written before and after, however it ends; returns the exit code."""
    try:
        folder.tidy()
        _open(folder, config)
        status, ending = _train(folder, make)
        folder.lock.check()  # The record is that of whoever took over.
        folder.update(status=status, ended=now(), **masked(ending))
    except RunnerError as error:  # Such as a full disk: what is written stays, and the exit code says so.
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CODES["failed"]
    if status != "finished":
        print(f"{status}: {ending['reason']}", file=sys.stderr, flush=True)
    return EXIT_CODES[status]


def follow(make: Callable[[], Run]) -> int:
    """Train in a process that keeps no record, beside the one that does; returns the exit code."""
    try:
        with INTERRUPTS.at_once():
            make().train()
    except KeyboardInterrupt as stop:
        return EXIT_CODES[_status_of(stop)]
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CODES["failed"]
    return EXIT_CODES["finished"]


def _status_of(stop: KeyboardInterrupt) -> str:
    return "preempted" if isinstance(stop, Preempted) else "interrupted"


def _open(folder: RunFolder, config: RunConfig) -> None:
    code, diff, mode = environment.code_version()
    for path in folder.diff_files():  # Those of an earlier attempt may be open to more readers than these.
        with writing(path):
            path.unlink(missing_ok=True)
    if diff:
        write_atomic(folder.diff_file, diff, mode=mode)
    plugins = dict(_open_plugins(folder, config))
    former = folder.record()
    mixed = [*former.get("resumed_with_other_code", []), *_other_code(folder, config, former)]
    record = {
        "format": FORMAT,
        "status": "running",
        "attempt": former.get("attempt", 0) + 1,
        "name": folder.path.name,
        "experiment": config.experiment,
        "started": now(),
        "command": masked_command(os.environ.get("SEQARCH_COMMAND", shlex.join(sys.argv))),
        "seeds": {"initialisation": config.seed, "training data": config.seed, "held-out data": 0},
        "code": {**code, "diff": folder.diff_file.name if diff else None, "sources": own_sources()},
        "plugins": plugins,
        **({"resumed_with_other_code": mixed} if mixed else {}),
        "environment": environment.software(),
        **({"data": former["data"]} if "data" in former else {}),
    }
    write_json(folder.run_file, record)


def _open_plugins(folder: RunFolder, config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entry of each plug-in, with its diff written beside the record."""
    for name, entry, diff, mode in plugin_records(config):
        path = folder.plugin_diff_file(name)
        if diff:
            write_atomic(path, diff, mode=mode)
        yield name, {**entry, "diff": path.name if diff else None}


def _other_code(folder: RunFolder, config: RunConfig, former: Mapping[str, Any]) -> list[str]:
    """What differs from the code that an earlier attempt got to its checkpoint with, where this one resumes from it."""
    found = difference(config, former) if has_begun(folder) else None
    return [] if found is None else [found]


def _train(folder: RunFolder, make: Callable[[], Run]) -> tuple[str, dict[str, Any]]:
    """The status that training ended with, and the entries of the record that follow from it."""
    run, status = None, "failed"
    ending: dict[str, Any] = {}
    with record_backends() as backends:
        try:
            with INTERRUPTS.at_once():
                run = make()
                described = _describe(run)
                kept = run.task.kept_files()
                _check_data(folder, described["data"], kept)
                _keep(folder, kept)
                folder.update(**masked(described))
                results = run.train()
            status, ending = "finished", {"results": results}
        except KeyboardInterrupt as stop:
            status, ending["reason"] = _status_of(stop), str(stop) or "stopped from outside"
        except EXPECTED as error:
            ending["reason"] = str(error)
        except Exception as error:  # A record of any failure; the whole of it goes to the log.
            traceback.print_exc()
            ending["reason"] = f"{type(error).__name__}: {error}"
    ending["backends"] = backends
    if run is not None:
        ending["cost"] = _cost(run)
        tracker = run.logger.tracker
        tracker.finish(status, ending.get("results", {}))
        if isinstance(tracker, Guarded) and tracker.error:
            ending["tracker_error"] = tracker.error
    return status, ending


def _check_data(folder: RunFolder, found: dict[str, Any], kept: dict[str, bytes]) -> None:
    """Refuse to go on with a run, or to try it again, on other data than an earlier attempt recorded.

    Args:
        kept: of the data as it is now, what the run's folder keeps of it.

    Raises:
        RunnerError: the data has another hash; named are the files that changed, where the folder has a list of them.
    """
    known = folder.record().get("data") or {}
    if known.get("hash") in (None, found["hash"]):
        return
    changed = [key for key in found if key != "hash" and known.get(key) != found[key]]
    parts = [f"{key} was {known.get(key)!r} and is {found[key]!r}" for key in changed]
    if DATA_FILES in kept and (folder.path / DATA_FILES).is_file():
        lists = ((folder.path / DATA_FILES).read_bytes(), kept[DATA_FILES])
        files = listed_changes(*(each.decode(errors="surrogateescape") for each in lists))
        parts = files[:3] + ([f"and {len(files) - 3} files more"] if len(files) > 3 else [])
    raise RunnerError(
        f"the data of {folder.path.name} changed since an earlier attempt at it: {', '.join(parts) or 'other content'};"
        f" bring the former data back, or move {folder.path} away to train anew"
    )


def _keep(folder: RunFolder, kept: dict[str, bytes]) -> None:
    """Write what the folder keeps of the data, where it is not there yet."""
    for name, content in kept.items():
        path = folder.path / name
        if not path.is_file() or path.read_bytes() != content:
            write_atomic(path, content)


def _describe(run: Run) -> dict[str, Any]:
    value, words = run.task.chance()
    return {
        "hardware": environment.hardware(run.engine.device),
        "data": {"task": run.task.name, **run.data.manifest()},
        "task": {"title": run.task.title, "reading": run.task.reading, "tokens": run.task.tokens},
        "metric": {**asdict(run.task.metric), "chance": value, "chance_label": words},
        "model": {
            "parameters": run.weights.count,
            "trained_parameters": run.weights.trained,
            "state_bytes": run.model.state_bytes(run.data.longest),
            "state_length": run.data.longest,
        },
        **_made_with(run.config.train),
    }


def _made_with(train: TrainConfig) -> dict[str, Any]:
    """The checkpoints that the run began with and learnt from: of which run and step, and the hash of its manifest."""
    named = {"started_from": (train.start_from, train.start_sha256), "teacher": (train.teacher, train.teacher_sha256)}
    return {key: _checkpoint(Path(path), digest) for key, (path, digest) in named.items() if path is not None}


def _checkpoint(path: Path, digest: str | None) -> dict[str, Any]:
    return {"run": path.parent.parent.name, "step": int(path.name.removeprefix("step-")), "sha256": digest}


def _cost(run: Run) -> dict[str, Any]:
    config, state, device = run.config.train, run.state, run.engine.device
    taken = list(zip(run.data.sources, run.steps_by_source(), strict=True))
    flops = sum(3 * run.model.flops(each.task.length, each.batch_size) * steps for each, steps in taken)
    given = run.config.machine.peak_flops
    peak = (given or measured_peak(device, config.precision)) * processes.count()
    tokens = run.data.tokens(run.steps_by_source())
    memory, gpu_memory = peak_memory(device)
    cost = {
        "steps": state.step,
        "bad_steps": state.bad_steps,
        "tokens": tokens,
        "processes": processes.count(),
        "train_seconds": state.train_seconds,
        "eval_seconds": state.eval_seconds,
        "processor_seconds": state.processor_seconds,
        "tokens_per_second": tokens / max(state.train_seconds, 1e-9),
        "flops": flops,
        "flops_formula": FLOPS_FORMULA if config.trains_all else f"{FLOPS_FORMULA}; as where all weights learn",
        "peak_flops": peak,
        "peak_flops_source": "given" if given else "a matrix product, measured",
        "utilisation": utilisation(flops, state.train_seconds, peak),
        "joules": state.joules,
        "peak_memory_bytes": max(state.peak_memory_bytes, memory),
        **price(state.train_seconds + state.eval_seconds, run.config.machine.price_per_hour),
    }
    if len(taken) > 1:
        cost["sources"] = {
            f"{number}": {"options": dict(each.overrides), "steps": steps, "tokens": steps * each.tokens}
            for number, (each, steps) in enumerate(taken)
        }
    if device.type == "cuda":
        cost["peak_gpu_memory_bytes"] = max(state.peak_gpu_memory_bytes, gpu_memory)
    return cost
