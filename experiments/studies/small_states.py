"""Trained runs with their states in fewer bits: what each still recalls, token by token, and the bytes that it carries.

A line of ``records.jsonl`` is one run, one format of its state and one length of the task's sequences. What is on
record is not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.config.build import build_task
from experiments.config.schema import RunConfig, run_config
from experiments.runs.recorded import RecordedRun
from experiments.studies.records import FILE, read_lines
from experiments.tasks import Batch
from experiments.tasks.task import IGNORED
from experiments.util.environment import code_version
from experiments.util.errors import RunnerError
from experiments.util.files import append_line
from seqarch import LanguageModel, load
from seqarch.checkpoints.errors import CheckpointError
from seqarch.models import quantize_state

RECORDS = FILE
WAYS = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic"},
    "error feedback": {"error_feedback": True},
}
"""How numbers are rounded."""

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"name": "float32"},
    **{
        f"{name}, {way}": {"name": name, **options}
        for name in ("bfloat16", "int8", "int4")
        for way, options in WAYS.items()
    },
}
"""The formats of a study, by what it calls them."""


@dataclass(frozen=True)
class Line:
    """What was measured of a run in one format at one length.

    Attributes:
        run, mixer, seed, task: of the run: its folder's name, its pattern, its seed, its task.
        trained: the length that it was trained at.
        length: of the sequences, which are read token by token.
        format: a name in :data:`FORMATS`.
        bytes: of the state of one sequence after them.
        recall: of each sequence, the share of right answers.
        loss: of each sequence, the mean loss of its answers, in nats.
        commit: of the code.
    """

    run: str
    mixer: str
    seed: int
    task: str
    trained: int
    length: int
    format: str
    bytes: int
    recall: list[float]
    loss: list[float]
    commit: str

    @property
    def key(self) -> tuple[str, int, str, int]:
        return self.run, self.length, self.format, len(self.recall)


def read_records(folder: Path) -> list[Line]:
    """The lines on record; errors as in :func:`experiments.studies.records.read_lines`."""
    return read_lines(folder, Line, "a small state")


def measure(
    runs: Iterable[RecordedRun], lengths: Iterable[int], sequences: int, formats: Iterable[str], folder: Path
) -> Iterator[tuple[Line, bool]]:
    """Each run in each format at each length, as a line and whether it is new: new ones are appended to the records.

    Raises:
        RunnerError: a run is not finished, its model cannot be loaded, or its task has no such sequences.
    """
    known = {line.key: line for line in read_records(folder)}
    commit = str(code_version()[0].get("commit", "unknown"))
    for run in runs:
        config, model = _config(run), None
        for length in lengths:
            batch = None
            for name in formats:
                key = (run.name, length, name, sequences)
                if key in known:
                    yield known[key], False
                    continue
                model = model or _model(run)
                batch = batch or test_batch(config, length, sequences)
                recall, loss, size = score(model, batch, FORMATS[name])
                line = Line(run.name, config.model.options.pattern, config.seed, config.task.name,
                            build_task(config).length, length, name, size, recall, loss, commit)  # fmt: skip
                append_line(folder / RECORDS, json.dumps(asdict(line)))
                yield line, True


def test_batch(config: RunConfig, length: int, sequences: int) -> Batch:
    """The first test sequences of a run's task at another length.

    Raises:
        RunnerError: the task's sequences have no such length.
    """
    try:
        options = replace(config.task.options, length=length, test_examples=sequences, test_lengths=[])
        task = build_task(replace(config, task=replace(config.task, options=options)))
        batches = list(task.evaluation("test"))
    except (TypeError, ValueError) as error:
        raise RunnerError(f"sequences of {length} tokens of the task {config.task.name}: {error}") from error
    tokens, targets = (np.concatenate([getattr(each, name) for each in batches]) for name in ("tokens", "targets"))
    return Batch(tokens, targets)


@torch.no_grad()
def score(model: LanguageModel, batch: Batch, options: Mapping[str, Any]) -> tuple[list[float], list[float], int]:
    """Recall and loss of each sequence, read token by token with a state in this format, and the bytes of one state."""
    quantize_state(model, **options)
    tokens, targets = torch.as_tensor(batch.tokens), torch.as_tensor(batch.targets)
    state = model.init_state(len(tokens), tokens.shape[1])
    hits, losses = [], []
    for token, target in zip(tokens.split(1, 1), targets.unbind(1), strict=True):
        logits, state = model(token, state)
        hits.append(logits[:, 0].argmax(-1) == target)
        losses.append(F.cross_entropy(logits[:, 0].float(), target, ignore_index=IGNORED, reduction="none"))
    asked = targets != IGNORED
    size = model.state_bytes(tokens.shape[1])
    return _means(torch.stack(hits, 1), asked), _means(torch.stack(losses, 1), asked), size


def _means(values: Tensor, asked: Tensor) -> list[float]:
    """Of each sequence the mean over its answers."""
    found = (values * asked).sum(1).double() / asked.sum(1)
    return [round(float(each), 6) for each in found]


def _config(run: RecordedRun) -> RunConfig:
    if not run.finished:
        raise RunnerError(f"{run.path}: the run is {run.ending}, expected one that is finished")
    return run_config({key: value for key, value in run.config.items() if key != "format"})


def _model(run: RecordedRun) -> LanguageModel:
    try:
        return load(run.path, device="cpu").eval()
    except CheckpointError as error:
        raise RunnerError(str(error)) from error
