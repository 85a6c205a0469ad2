"""The contract of a tracker: a sink that gets a run's metrics beside the run's own files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrackerOptions:
    """No options."""


class Tracker:
    """Gets the metrics of a run. This one keeps nothing; others override what they need.

    Args:
        options: an instance of ``Config``, into which a run's ``tracker.options`` are converted before it starts.
        folder: the run's folder.
        config: its configuration.
    """

    Config: type[Any] = TrackerOptions
    package: str | None = None
    """The package that must be installed for it."""

    def __init__(self, options: Any, folder: Path, config: Mapping[str, Any]): ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_steps(self, values: Mapping[int, Mapping[str, float]]) -> None:
        """Log the values of several steps, in order."""
        for step, each in values.items():
            self.log(step, each)

    def finish(self, status: str, results: Mapping[str, Any]) -> None: ...
