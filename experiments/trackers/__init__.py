"""Sinks of a run's metrics beside its own files, which can never stop it: a file per tracker, and a line here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.trackers.guarded import Guarded
from experiments.trackers.tensorboard import TensorboardTracker
from experiments.trackers.tracker import Tracker, TrackerOptions
from experiments.trackers.wandb import WandbTracker

TRACKERS: dict[str, type[Tracker]] = {
    "none": Tracker,
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
}

__all__ = ["TRACKERS", "Guarded", "Tracker", "TrackerOptions", "make_tracker", "missing_package"]


def missing_package(name: str) -> str | None:
    """The package that the tracker of that name needs and that is not installed; ``None`` where nothing is missing."""
    package = TRACKERS[name].package
    return None if package is None or importlib.util.find_spec(package) is not None else package


def make_tracker(name: str, options: Any, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker of that name, guarded, with options that are an instance of its ``Config``."""
    return Guarded(name, lambda: TRACKERS[name](options, folder, config))
