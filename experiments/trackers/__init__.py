"""Sinks that hear of a run's metrics beside its own files, and can never stop it."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.util.errors import ConfigError, choices_hint
from experiments.util.files import read_json, write_atomic

PATIENCE_SECONDS = 60.0
"""How long a tracker may take to begin, to hear of a step, or to end."""


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
    package: str | None = None
    """What must be installed for it."""

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
    """Weights & Biases; offline unless told otherwise, with its files in the run's folder under ``wandb/``.

    All attempts at a run are one run there, under an id that the first one makes and keeps beside those files: the hash
    in the folder's name, with chance digits, so that the same run trained anew from an empty folder is another one.
    Steps that an attempt does again are not sent again; they are the same to the bit.
    """

    Config, package = WandbOptions, "wandb"

    def __init__(self, options: WandbOptions, folder: Path, config: Mapping[str, Any]):
        import wandb

        self._file = folder / "wandb" / "told.json"
        told = read_json(self._file) or {}
        self._id = told.get("id") or f"{folder.name.rpartition('-')[2]}-{secrets.token_hex(4)}"
        self._step = told.get("step", 0)
        self._file.parent.mkdir(exist_ok=True)
        self._keep(self._step)
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            tags=options.tags,
            mode=options.mode,
            dir=folder,
            id=self._id,
            resume="allow",
            name=folder.name,
            group=config["experiment"],
            config=dict(config),
            allow_val_change=True,  # In what makes no other run of it, such as its tracker's options.
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._step:
            self._keep(step)
            self._run.log(dict(values), step=step)

    def _keep(self, step: int) -> None:
        self._step = step
        write_atomic(self._file, json.dumps({"id": self._id, "step": step}), durable=False)

    def finish(self, status: str, results: Mapping[str, Any]) -> None:
        self._run.summary.update({"status": status, **{k: v for k, v in results.items() if isinstance(v, float)}})
        self._run.finish(exit_code=0 if status == "finished" else 1)


class TensorboardTracker(Tracker):
    """TensorBoard's event files, in the run's folder under ``tensorboard/``: ``tensorboard --logdir runs``."""

    package = "tensorboard"

    def __init__(self, options: TrackerOptions, folder: Path, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._make = lambda step: SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self._config, self._writer, self._step = config, None, 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:  # Only now is it known from which step on an earlier attempt is done again.
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


class Guarded(Tracker):
    """Another tracker, whose first failure is reported and ends its use; training goes on.

    To hang is a failure too: after :data:`PATIENCE_SECONDS` the processes that the tracker started are killed, as they
    could keep this one from ending.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]):
        self.name, self.error = name, None
        self._inner: Tracker | None = None
        before, self._started = children(), set()
        self._try(lambda: setattr(self, "_inner", make()))
        self._started = children() - before

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if inner := self._inner:
            self._try(lambda: inner.log(step, values))

    def finish(self, status: str, results: Mapping[str, Any]) -> None:
        if inner := self._inner:
            self._try(lambda: inner.finish(status, results))

    def _try(self, action: Callable[[], None]) -> None:
        told: list[str] = []

        def work() -> None:
            try:
                action()
            except Exception as error:  # Whatever a third party's service does, the run is worth more.
                told.append(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(PATIENCE_SECONDS)
        if thread.is_alive():
            told.append(f"no answer within {PATIENCE_SECONDS:g} seconds")
            for pid in self._started & children():
                os.kill(pid, signal.SIGKILL)
        if told:
            self._inner, self.error = None, told[0]
            print(f"tracker {self.name} failed and is not used any more: {self.error}", file=sys.stderr, flush=True)


def children(pid: int | str = "self") -> set[int]:
    """The processes that a process started, by default this one; none where the system does not say."""
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # A thread that has ended meanwhile.
            found |= {int(pid) for pid in task.read_text().split()}
    return found


TRACKERS: dict[str, type[Tracker]] = {
    "none": Tracker,
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
}


def require_tracker(name: str) -> None:
    """Check, before a run begins, that what its tracker needs is installed.

    Raises:
        ConfigError: it is not.
    """
    package = TRACKERS[name].package
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"tracker.name: {name!r} needs the package {package}, which is not installed: pip install {package},"
            " or choose tracker=none"
        )


def make_tracker(name: str, options: Any, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker of that name, guarded, with options that are an instance of its ``Config``."""
    return Guarded(name, lambda: TRACKERS[name](options, folder, config))
