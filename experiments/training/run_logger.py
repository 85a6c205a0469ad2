"""The log of a run while it trains: metrics, progress, bad batches, and lines for people."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from experiments.config.schema import RunConfig, to_dict
from experiments.runs.folder import RunFolder
from experiments.tasks.task import Batch
from experiments.trackers import Tracker, make_tracker
from experiments.training import processes
from experiments.training.progress import ProgressFile
from experiments.training.step_monitor import StepStats
from experiments.util.files import make_folder, write_atomic
from experiments.util.secrecy import masked


class NullLogger:
    """Writes nothing: the logger of all processes but one."""

    tracker = Tracker(None, Path(), {})

    def start(self, step: int, evaluations: int) -> None:
        """Training begins after ``step``, up to which there were so many evaluations: what lies beyond is dropped."""

    def check(self) -> None:
        """Raise if another process took the run over, and writes now."""

    def progress(self, step: int, loss: Tensor, tokens_per_second: float) -> None:
        """Where training is, for whoever watches."""

    def log_steps(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """The metrics of steps of training, ``step`` among them, in order; not said to people."""

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        """The metrics of an evaluation on the validation split, ``step`` among them."""

    def info(self, text: str) -> None:
        """A line for people."""

    def save_batch(self, stats: StepStats, batch: Batch) -> Path | None:
        """Keep the batch of a bad step; where."""


class RunLogger(NullLogger):
    """Writes into the run's folder, to its tracker and to the terminal."""

    def __init__(self, folder: RunFolder, config: RunConfig):
        self._folder, self._steps = folder, config.train.steps
        self._progress = ProgressFile(folder, self._steps, 0)
        self.tracker = make_tracker(config.tracker.name, config.tracker.options, folder.path, masked(to_dict(config)))

    def start(self, step: int, evaluations: int) -> None:
        kept = self._folder.keep_metrics(lambda line: line["step"] <= step)
        if kept < evaluations:
            lost = evaluations - kept
            self.info(f"{lost} of the {evaluations} lines of metrics up to step {step} are lost; the weights are not")
            self._folder.update(metrics_lost={"lines": lost, "of": evaluations, "up_to_step": step})
        self._progress = ProgressFile(self._folder, self._steps, step)

    def check(self) -> None:
        self._folder.lock.check()

    def progress(self, step: int, loss: Tensor, tokens_per_second: float) -> None:
        self._progress.update(step, loss, tokens_per_second)

    def log_steps(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if lines:
            self._folder.append_steps(lines)
            self.tracker.log_steps({values["step"]: _numbers(values) for values in lines})

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        self._folder.append_metrics(**values)
        numbers = _numbers(values)
        self.tracker.log(values["step"], numbers)
        self.info(" ".join(f"{name} {value:.5g}" for name, value in numbers.items()))

    def info(self, text: str) -> None:
        print(text, flush=True)

    def save_batch(self, stats: StepStats, batch: Batch) -> Path:
        path = self._folder.bad / f"step-{stats.step:06d}.npz"
        make_folder(path.parent)
        content = io.BytesIO()
        arrays = {name: part for name, part in batch.read().items() if part is not None}
        np.savez_compressed(content, **arrays, **stats._asdict())
        write_atomic(path, content.getvalue())
        return path


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def make_logger(folder: RunFolder, config: RunConfig) -> NullLogger:
    return RunLogger(folder, config) if processes.is_main() else NullLogger()
