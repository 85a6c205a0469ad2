"""The configuration of a run, as typed dataclasses.

Hydra only composes a dictionary; :func:`run_config` makes it typed or fails with the full path of what is wrong.
A run's identity is the hash of everything that can change its result, so the same configuration always finds the
same folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments.config import names
from experiments.config.convert import convert
from experiments.config.plugins import KEYS, import_plugins, register_model_paths, register_path
from experiments.config.targets import MatchConfig
from experiments.config.tasks import TaskConfig, task_config
from experiments.config.training import TrainConfig
from experiments.tasks import TASKS
from experiments.trackers import TRACKERS
from experiments.util.errors import ConfigError, RunnerError, choices_hint
from experiments.util.files import read_json
from seqarch.checkpoints.manifest import FORMAT as FORMAT

NOT_IDENTITY = (
    *("runs", "plugins", "tracker", "machine", "match"),
    *("train.keep_last", "train.save_every", "train.log_every", "train.dry_run", "train.start_from", "train.teacher"),
    *("task.tokenizer", "task.data_cache"),
)
"""Keys that change where a run is kept, on what it runs or which tracker gets its metrics, and never its results
but for rounding; what ``match`` asks for is in the widths that it was solved to, and what a run starts from counts by
its content (``train.start_sha256``) and not by its place, as do a teacher (``train.teacher_sha256``) and a tokenizer
(``task.tokenizer_sha256``)."""


OtherCode = Literal["refuse", "keep", "rerun", "rerun_any"]
"""What is done with a run that was trained, to its end or to a checkpoint, with other code. ``refuse``, where sources
of plug-ins differ: it is left as it is, and the sweep says what differs and fails; ``keep``: it counts and resumes all
the same; ``rerun``: it is moved aside and trained anew; ``rerun_any``: so it is where those of seqarch or the runner
do."""


@dataclass(frozen=True)
class ModelConfig:
    """A model's name and the options of the library's language model, which stand beside the name in ``model``.

    Attributes:
        name: its name in tables and plots; the folder's name begins with it.
        options: an instance of :class:`seqarch.models.LMConfig`, with the vocabulary of the task. Options of mixers and
            channel mixers that the pattern does not use are checked and left out.
    """

    name: str
    options: Any


@dataclass(frozen=True)
class TrackerConfig:
    """Where metrics go beside the run's own files.

    Attributes:
        name: a key of ``TRACKERS``.
        options: an instance of ``TRACKERS[name].Config``.
    """

    name: str = "none"
    options: Any = field(default_factory=TRACKERS["none"].Config)


@dataclass(frozen=True)
class MachineConfig:
    """The machine that a run is given, and its price.

    Attributes:
        processes: on this machine, started by torchrun to train each run together; 0 only makes the run's folder, for
            a torchrun of one's own.
        peak_flops: FLOPs per second of one process's device at ``train.precision``; 0 measures a matrix product.
        price_per_hour: of all that a run occupies, in any currency; 0 where it costs nothing.
    """

    processes: int = 1
    peak_flops: float = 0.0
    price_per_hour: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number and not negative, got {value}")


@dataclass(frozen=True)
class RunConfig:
    """One run: the content of ``config.json``.

    Attributes:
        experiment: the folder below ``runs``, such as ``mqar`` or ``demo/recall``; ``name`` on the command line.
        seed: of the initialisation and of the training data; held-out data are the same for every seed.
        runs: the root of all run folders.
        plugins: modules that register mixers, tasks or trackers of one's own, by their dotted names; each process of
            the run imports them first.
        match: the parameters and the state that the model's widths were solved for; nothing by default.
        shown: options in which the run differs from its experiment, by path, for the name of a new folder; no part of
            what is kept, nor of what is compared.
    """

    experiment: str
    seed: int
    model: ModelConfig
    task: TaskConfig
    train: TrainConfig
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    runs: str = "runs"
    plugins: list[str] = field(default_factory=list)
    match: MatchConfig = field(default_factory=MatchConfig)
    shown: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        folder_path("runs", self.runs)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}")
        names.check_experiment("experiment", self.experiment)
        if "/" in names.check_experiment("model.name", self.model.name):
            raise ValueError(f"model.name must be usable as a folder's name, got {self.model.name!r}")
        if self.train.batch_size % max(self.machine.processes, 1):
            shares = f"train.batch_size is {self.train.batch_size}, machine.processes {self.machine.processes}"
            raise ValueError(f"{shares}: every process has to get the same number of sequences")
        self._check_stages()

    def _check_stages(self) -> None:
        """Refuse a curriculum whose stages could not end, and options of stages without one."""
        if self.task.order == "curriculum":
            if self.train.schedule != "until_converged":
                raise ValueError(
                    f"task.order: a curriculum ends each stage when it has converged: it needs train.schedule:"
                    f" until_converged, got {self.train.schedule!r}"
                )
        elif self.train.stage_target is not None or self.train.stage_warmup:
            name = "stage_warmup" if self.train.stage_target is None else "stage_target"
            raise ValueError(f"train.{name} is of the stages of a curriculum, and task.order is {self.task.order!r}")

    def identity(self) -> dict[str, Any]:
        """All that distinguishes this run from others: the resolved configuration without :data:`NOT_IDENTITY`.

        Equal configurations have one identity: numbers count by their value, and a layer's option at its default is
        as one that is left out.
        """
        from experiments.config.options import canonical  # Imports torch, which a wrong key need not wait for.

        given = without(to_dict(self), NOT_IDENTITY)
        return {**given, "model": canonical(given["model"])}

    def digest(self) -> str:
        """The hash of the identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def folder(self) -> Path:
        """The folder of the run: the one of its identity, whatever its name shows, or where there is none, a new one.

        A folder whose configuration cannot be read is taken for it by the digits of its name alone.
        """
        digest = self.digest()
        return self._there(digest) or self._parent / names.folder_name(
            self.model.name, self.seed, digest, self._shown_of_its_layers
        )

    @property
    def is_there(self) -> bool:
        """Whether there is a folder of the run's identity."""
        return self._there(self.digest()) is not None

    def _there(self, digest: str) -> Path | None:
        try:
            found = os.listdir(self._parent)
        except OSError:
            return None
        paths = [self._parent / name for name in names.with_digest(found, self.model.name, self.seed, digest)]
        return next((path for path in paths if _digest_of(path) in (digest, None)), None)

    @property
    def _parent(self) -> Path:
        return Path(self.runs) / self.experiment

    @property
    def _shown_of_its_layers(self) -> dict[str, Any]:
        """What is shown, without the options of layers that the model does not have."""
        layers = ("model.mixers.", "model.channels.")
        has = [f"{layer}{name}." for layer in layers for name in getattr(self.model.options, layer.split(".")[1])]
        return {path: value for path, value in self.shown.items()
                if not path.startswith(layers) or path.startswith(tuple(has))}  # fmt: skip

    def may_name(self, name: str) -> bool:
        """Whether the folder of this run can have that name; versions differ in what they hash."""
        return names.can_be(name, self.model.name, self.seed)


def _digest_of(folder: Path) -> str | None:
    """The hash of the identity of the run in a folder; ``None`` where its configuration cannot be read."""
    try:
        stored = read_json(folder / "config.json") or {}
        return run_config({key: value for key, value in stored.items() if key != "format"}).digest()
    except RunnerError:
        return None


def folder_path(name: str, given: object) -> Path:
    """The path of a folder that an option names.

    Raises:
        ConfigError: it is none, or begins with a ``~`` that no shell has replaced.
    """
    if not isinstance(given, str) or not given.strip():
        raise ConfigError(f"{name}: expected the path of a folder, got {given!r}")
    if given.startswith("~"):
        raise ConfigError(f"{name}: {given!r} begins with a ~ that the shell did not replace; write $HOME instead")
    return Path(given)


def without(values: Mapping[str, Any], paths: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    """Nested mappings without the entries at these dotted paths."""
    kept = {key: value for key, value in values.items() if f"{prefix}{key}" not in paths}
    return {
        key: without(value, paths, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in kept.items()
    }


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one: ``{"train": {"lr": 1}}`` is ``{"train.lr": 1}``."""
    if isinstance(value, Mapping) and value:
        return {name: item for key, inner in value.items() for name, item in flat(inner, f"{path}.{key}").items()}
    return {path.lstrip("."): value}


def run_config(composed: Mapping[str, Any]) -> RunConfig:
    """The typed form of a composed configuration.

    Raises:
        ConfigError: naming the full path of a wrong key, type or value and the nearest right one.
    """
    typed = dict(composed)
    typed["plugins"] = _plugins(typed)
    for name, make in _PARTS.items():
        if isinstance(typed.get(name), Mapping):
            typed[name] = make(typed[name])
    # The model comes last: its options are the library's, which imports torch, and a wrong key need not wait for that.
    if isinstance(typed.get("task"), TaskConfig) and isinstance(typed.get("model"), Mapping):
        typed["model"] = _model_config(typed["model"], typed["task"])
    return convert(RunConfig, typed)


def _model_config(model: Mapping[str, Any], task: TaskConfig) -> ModelConfig:
    from experiments.config.options import language_model

    name = {key: value for key, value in model.items() if key == "name"}
    given = {key: value for key, value in model.items() if key != "name"}
    register_model_paths(given)
    options = language_model(given, TASKS[task.name](task.options).vocab_size)
    return convert(ModelConfig, {**name, "options": options}, "model")


def _plugins(composed: dict[str, Any]) -> list[str]:
    """The plug-ins of a configuration, which are imported; of those under the former name of the key, too."""
    names: list[str] = []
    for key in KEYS:
        given = convert(list[str], composed.pop(key, []), key)
        import_plugins(given, key)
        names += [name for name in given if name not in names]
    return names


def _tracker_config(tracker: Mapping[str, Any]) -> TrackerConfig:
    name = tracker.get("name", TrackerConfig.name)
    register_path("tracker.name", name)
    if not isinstance(name, str) or name not in TRACKERS:
        raise ConfigError(f"tracker.name: unknown tracker {name!r}, {choices_hint(name, TRACKERS)}")
    options = convert(TRACKERS[name].Config, tracker.get("options", {}), "tracker.options")
    return convert(TrackerConfig, {**tracker, "options": options}, "tracker")


_PARTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "task": task_config,
    "tracker": _tracker_config,
    "train": partial(convert, TrainConfig, path="train"),
    "machine": partial(convert, MachineConfig, path="machine"),
}
"""By key of a run's configuration, its typed form; the model's is made when that of the task is known."""


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The inverse of :func:`run_config`, ready for JSON."""
    plain = {key: value for key, value in asdict(config).items() if key != "shown"}
    task, model = plain["task"], plain["model"]
    options = {name: value for name, value in model["options"].items() if name != "vocab_size"}  # The task gives it.
    return {
        **plain,
        "model": {"name": model["name"], **options},
        "task": {"name": task["name"], **task["options"], **config.task.plain()},
        "train": config.train.plain(),
    }


def check_format(stored: Mapping[str, Any], where: object) -> None:
    """Check that something kept of a run is of :data:`FORMAT`; the first format did not say so.

    Raises:
        RunnerError: it is of another one.
    """
    if (found := stored.get("format", 1)) != FORMAT:
        raise RunnerError(
            f"{where} is of format {found!r}, and this version of the runner reads {FORMAT}: read it with the version"
            " that wrote it, or train the run again elsewhere"
        )
