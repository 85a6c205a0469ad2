"""TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.trackers.tracker import Tracker, TrackerOptions


class TensorboardTracker(Tracker):
    """TensorBoard's event files, in the run's folder under ``tensorboard/``: ``tensorboard --logdir runs``."""

    package = "tensorboard"

    def __init__(self, options: TrackerOptions, folder: Path, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._make = lambda step: SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self._config, self._writer, self._step = config, None, 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:  # Only now is the step known from which an earlier attempt is repeated.
            self._writer = self._make(step)
            self._writer.add_text("config", f"```json\n{json.dumps(self._config, indent=2)}\n```", step)
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, status: str, results: Mapping[str, Any]) -> None:
        if self._writer is not None:
            for name, value in results.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"results/{name}", value, self._step)
            self._writer.close()
