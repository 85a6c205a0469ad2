"""Recorded runs as lines of JSON, small enough to be committed: what a page is made from.

A line is a run: its configuration but for what is at its default or changes no result, and of its record what tables
and plots need. Runs that failed have a line as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from experiments.config.schema import FORMAT, RunConfig, TrainConfig, check_format, run_config
from experiments.runs.folder import RunFolder
from experiments.runs.recorded import RecordedRun
from experiments.training.step_monitor import DIVERGED
from experiments.util.errors import RunnerError
from experiments.util.files import write_atomic
from seqarch.models import LanguageModel, LMConfig

L = TypeVar("L")
FILE = "records.jsonl"
NOT_KEPT = ("device", "threads", "keep_last", "save_every", "log_every", "dry_run")
"""Options of training that change no result but for rounding; threads are in the record of the hardware."""

KEPT = {
    "model": ("parameters", "state_bytes", "state_length"),
    "metric": ("name", "label", "unit", "higher_is_better", "chance", "chance_label"),
    "task": ("title",),
    "data": ("hash",),
    "cost": ("steps", "flops", "train_seconds", "processor_seconds", "tokens_per_second"),
    "code": ("commit", "dirty"),
    "hardware": ("cpu", "cores", "threads", "gpu"),
    "environment": ("python",),
}
"""The entries that a line keeps of each part of a run's record."""


def to_line(
    config: RunConfig, folder: RunFolder, study: Mapping[str, str], history: Sequence[str] = ()
) -> dict[str, Any] | None:
    """A run as a line of records; ``None`` where it has neither finished nor diverged.

    A run that failed for another reason, such as a full disk or memory, says nothing of its arm and is tried again.

    Args:
        study: the arm, the stage and the plan that it is a run of.
        history: names, or endings of names, of metrics to keep from every evaluation on validation.
    """
    record = folder.record()
    status, reason = record.get("status"), str(record.get("reason", ""))
    if status != "finished" and not (status == "failed" and reason.startswith(DIVERGED)):
        return None
    kept = {part: {name: record[part][name] for name in names if name in record[part]}
            for part, names in KEPT.items() if part in record}  # fmt: skip
    if "environment" in record:
        kept["environment"]["torch"] = record["environment"]["packages"]["torch"]
    results = {name: value for name, value in record.get("results", {}).items() if name != "checkpoint"}
    # What follows names paths of the machine.
    told = {"reason": reason.partition(";")[0]} if reason else {}
    metrics = [{name: value for name, value in line.items() if name == "step" or name.endswith(tuple(history))}
               for line in folder.evaluations()] if history else []  # fmt: skip
    return {
        "format": FORMAT,
        "run": folder.path.name,
        "config": shortened(config),
        "record": {"status": status, **told, "study": dict(study), "results": results, **kept},
        **({"metrics": metrics} if history else {}),
    }


def shortened(config: RunConfig) -> dict[str, Any]:
    """The configuration without defaults and without what changes no result."""
    plain = config.identity()
    train = {name: value for name, value in _given(TrainConfig, plain["train"]).items() if name not in NOT_KEPT}
    model = _given(LMConfig, plain["model"])
    wanted = {"weight_decay": plain["train"]["weight_decay"]}  # A comparison shows it.
    return {
        "experiment": config.experiment,
        "seed": config.seed,
        "model": {"mixers": {}, **model},
        "task": plain["task"],
        "train": {**wanted, **train},
    }


def _given(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a configuration that are not at their defaults."""
    defaults = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    return {name: value for name, value in values.items()
            if value not in ({}, None) and (name not in defaults or value != defaults[name])}  # fmt: skip


class Ledger:
    """The file of a study's records, to which lines are added as runs end; for the one process that trains.

    Raises:
        RunnerError: a line that is there is no record.
    """

    def __init__(self, folder: Path):
        self._file = folder / FILE
        self.runs: list[RecordedRun] = read(folder) if self._file.exists() else []
        self._lines = self._file.read_text(encoding="utf-8").splitlines() if self.runs else []

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one more line; the file is whole at every moment.

        Raises:
            RunnerError: somebody else has changed the file since.
        """
        there = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        if there != self._lines:
            raise RunnerError(
                f"{self._file} was changed while the study ran: the same command goes on from what it holds"
            )
        text = json.dumps(rounded(line), separators=(",", ":"))
        self.runs.append(_from_line(text, "a new line"))
        self._lines.append(text)
        write_atomic(self._file, "".join(f"{each}\n" for each in self._lines))


def rounded(value: Any) -> Any:
    """Floats to seven digits, which is what float32 holds."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def read(folder: Path) -> list[RecordedRun]:
    """The runs that a folder's file of records holds.

    Raises:
        RunnerError: there is no such file, or a line of it is no record.
    """
    file = folder / FILE
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RunnerError(f"{file} does not exist: run the study {folder.name} first, in the same version") from None
    except (OSError, ValueError) as error:
        raise RunnerError(f"cannot read {file}: {error}") from error
    return [_from_line(text, f"line {number} of {file}") for number, text in enumerate(lines, 1)]


def _from_line(text: str, where: str) -> RecordedRun:
    try:
        whole = json.loads(text)
        config, record, metrics = {**whole["config"]}, {**whole["record"]}, [*whole.get("metrics", [])]
        run = RecordedRun(RunFolder(whole["run"]), config, record, kept_metrics=metrics)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunnerError(
            f"{where} is no record of a run ({type(error).__name__}: {error}); without that line its run is made again"
        ) from error
    check_format(whole, where)
    return run


def state_after(run: RecordedRun, length: int) -> int:
    """Bytes of state that the model of a recorded run has after so many tokens of one sequence."""
    return model_of(run).state_bytes(length)


def model_of(run: RecordedRun) -> LanguageModel:
    """The model of a recorded run, without numbers (on the meta device)."""
    config = run_config({key: value for key, value in run.config.items() if key != "format"})
    with torch.device("meta"):
        return LanguageModel(config.model.options)


def digest(folder: Path) -> str:
    """A hash over a file of records, which a plot made from it carries."""
    return hashlib.sha256((folder / FILE).read_bytes()).hexdigest()


def read_lines(folder: Path, kind: Callable[..., L], said: str) -> list[L]:
    """The lines of a file of records, each what ``kind`` makes of its entries; none where there is no file.

    Args:
        said: what a line is a record of, for the error.

    Raises:
        RunnerError: a line is damaged.
    """
    path, found = folder / FILE, []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found.append(kind(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise RunnerError(f"{path}: line {number} is no record of {said}: {error}") from error
    return found
