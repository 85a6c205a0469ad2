"""Sinks that hear of a run's metrics beside its own files, and can never stop it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.errors import choices_hint


@dataclass(frozen=True)
class TrackerOptions:
    """No options."""


class Tracker:
    """Hears of a run. This one keeps nothing; others override what they need.

    Args:
        options: an instance of ``Config``, into which a run's ``tracker.options`` are converted before it starts.
        folder: the run's folder.
        config: its configuration.
    """

    Config: type[Any] = TrackerOptions

    def __init__(self, options: Any, folder: Path, config: Mapping[str, Any]): ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def finish(self, status: str, results: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class WandbOptions:
    """
    Attributes:
        mode: ``offline`` or ``online``.
        entity: the user or team whose project it is; ``None`` for the default of the account.
    """

    project: str = "seqarch"
    mode: Any = "offline"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.mode not in ("offline", "online"):
            raise ValueError(f"mode is {self.mode!r}, {choices_hint(self.mode, ('offline', 'online'))}")


class WandbTracker(Tracker):
    """Weights & Biases; offline unless told otherwise, with its files in the run's folder under ``wandb/``."""

    Config = WandbOptions

    def __init__(self, options: WandbOptions, folder: Path, config: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            tags=options.tags,
            mode=options.mode,
            dir=folder,
            name=folder.name,
            group=config["experiment"],
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, status: str, results: Mapping[str, Any]) -> None:
        self._run.summary.update({"status": status, **{k: v for k, v in results.items() if isinstance(v, float)}})
        self._run.finish(exit_code=0 if status == "finished" else 1)


class Guarded(Tracker):
    """Another tracker, whose first failure is reported and ends its use; training goes on."""

    def __init__(self, name: str, make: Callable[[], Tracker]):
        self.name, self.error = name, None
        self._inner: Tracker | None = None
        self._try(lambda: setattr(self, "_inner", make()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if inner := self._inner:
            self._try(lambda: inner.log(step, values))

    def finish(self, status: str, results: Mapping[str, Any]) -> None:
        if inner := self._inner:
            self._try(lambda: inner.finish(status, results))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # Whatever a third party's service does, the run is worth more.
            self._inner = None
            self.error = f"{type(error).__name__}: {error}"
            print(f"tracker {self.name} failed and is not used any more: {self.error}", file=sys.stderr, flush=True)


TRACKERS: dict[str, type[Tracker]] = {
    "none": Tracker,
    "wandb": WandbTracker,
}


def make_tracker(name: str, options: Any, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker of that name, guarded, with options that are an instance of its ``Config``."""
    return Guarded(name, lambda: TRACKERS[name](options, folder, config))
