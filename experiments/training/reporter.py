"""What one process writes of a run's training while it lasts: metrics, progress, bad batches, and lines for people."""

from __future__ import annotations

import io
from collections.abc import Mapping
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
from experiments.training.step_monitor import Reading
from experiments.util.files import make_folder, write_atomic
from experiments.util.secrecy import masked


class Silent:
    """Writes nothing, in all processes but one."""

    tracker = Tracker(None, Path(), {})

    def begin(self, step: int, looks: int) -> None:
        """Training goes on after ``step``, up to which there were so many looks: what was written beyond is dropped."""

    def check(self) -> None:
        """Raise ``ClaimLost`` if another process took the run over, and writes now."""

    def show(self, step: int, loss: Tensor, tokens_per_second: float) -> None:
        """Where training is, for whoever watches."""

    def line(self, values: Mapping[str, Any]) -> None:
        """What a look at the validation split found."""

    def tell(self, text: str) -> None:
        """A line for people."""

    def keep_batch(self, reading: Reading, batch: Batch) -> Path | None:
        """Keep the batch of a bad step; where."""


class Reporter(Silent):
    """Writes into the run's folder, to its tracker and to the terminal."""

    def __init__(self, folder: RunFolder, config: RunConfig):
        self._folder, self._steps = folder, config.train.steps
        self._progress = ProgressFile(folder, self._steps, 0)
        self.tracker = make_tracker(config.tracker.name, config.tracker.options, folder.path, masked(to_dict(config)))

    def begin(self, step: int, looks: int) -> None:
        kept = self._folder.keep_metrics(lambda line: line["step"] <= step)
        if kept < looks:
            self.tell(f"{looks - kept} of the {looks} lines of metrics up to step {step} are lost; the weights are not")
            self._folder.update(metrics_lost={"lines": looks - kept, "of": looks, "up_to_step": step})
        self._progress = ProgressFile(self._folder, self._steps, step)

    def check(self) -> None:
        self._folder.claim.check()

    def show(self, step: int, loss: Tensor, tokens_per_second: float) -> None:
        self._progress.show(step, loss, tokens_per_second)

    def line(self, values: Mapping[str, Any]) -> None:
        self._folder.append_metrics(**values)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.tracker.log(values["step"], numbers)
        self.tell(" ".join(f"{name} {value:.5g}" for name, value in numbers.items()))

    def tell(self, text: str) -> None:
        print(text, flush=True)

    def keep_batch(self, reading: Reading, batch: Batch) -> Path:
        path = self._folder.bad / f"step-{reading.step:06d}.npz"
        make_folder(path.parent)
        content = io.BytesIO()
        arrays = {name: part for name, part in batch._asdict().items() if part is not None}
        np.savez_compressed(content, **arrays, **reading._asdict())
        write_atomic(path, content.getvalue())
        return path


def make_reporter(folder: RunFolder, config: RunConfig) -> Silent:
    return Reporter(folder, config) if processes.is_main() else Silent()
