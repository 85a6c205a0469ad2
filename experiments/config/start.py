"""The checkpoints that a run is made with, those of ``train.start_from`` and ``train.teacher``, known by their content.

Each is found, checked and compared with the run's model before anything is written, and from then on named by its
folder and by the hash of its manifest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.config.schema import RunConfig, TrainConfig, check_format, folder_path, run_config
from experiments.util.errors import ConfigError, RunnerError
from experiments.util.files import read_json
from seqarch.checkpoints.manifest import MANIFEST, damage, file_digest, manifest_digest, read_manifest
from seqarch.convert import carry_over, check_pair
from seqarch.convert.planning import fitted
from seqarch.models import LanguageModel, LMConfig

KEY = "train.start_from"
TEACHER = "train.teacher"


def with_start(config: RunConfig) -> RunConfig:
    """The configuration with its start and its teacher named by the folders of checkpoints and the hashes of their
    manifests, and, of a start that is converted, with the sizes that fit its mixers to that.

    Raises:
        ConfigError: one is needed and not named, there is no such checkpoint, it is damaged, its model does not fit, or
            it is not the one that ``train.start_sha256`` or ``train.teacher_sha256`` asks for.
    """
    train = config.train
    _check_named(train)
    if config.machine.processes > 1 and (train.teacher or train.convert or not train.trains_all):
        given = "teacher" if train.teacher else "convert" if train.convert else train.restriction
        raise ConfigError(
            f"train.{given}: such a run has one process, and machine.processes is {config.machine.processes}"
        )
    if train.start_from is not None:
        path, digest = _found(KEY, train.start_from, "start_sha256", train.start_sha256)
        train = replace(train, start_from=str(path), start_sha256=digest)
        config = replace(_fit(path, config), train=train)
    if train.teacher is not None:
        path, digest = _found(TEACHER, train.teacher, "teacher_sha256", train.teacher_sha256)
        _check_teacher(path, config)
        config = replace(config, train=replace(train, teacher=str(path), teacher_sha256=digest))
    return config


def _check_named(train: TrainConfig) -> None:
    """Refuse what is of a checkpoint that is not named."""
    if train.start_from is None:
        if train.lora is not None:
            raise ConfigError(f"train.lora changes what {KEY} names, the folder of a run: it is not given")
        for name in ("convert", "start_sha256"):
            if (given := getattr(train, name)) is not None:
                raise ConfigError(f"train.{name}={given}: {name} is of what start_from names, and that is not given")
    if train.teacher is None:
        if train.teacher_sha256 is not None:
            raise ConfigError("train.teacher_sha256 is of what teacher names, and that is not given")
        if train.objective != "targets":
            raise ConfigError(
                f"train.objective={train.objective} needs {TEACHER}, the folder of a run: it is not given"
            )


def _found(key: str, given: str, hash_key: str, wanted: str | None) -> tuple[Path, str]:
    """The folder of an intact checkpoint, and the hash of its manifest."""
    path = _checkpoint(key, folder_path(key, given))
    manifest = read_manifest(path)
    listed = manifest["files"] if manifest else {}
    there = {name: file_digest(path / name) for name in listed if (path / name).is_file()}
    if problem := damage(manifest, there):
        raise ConfigError(f"{key}: checkpoint {path} is damaged: {problem}")
    digest = manifest_digest(manifest or {})
    if wanted not in (None, digest):
        raise ConfigError(f"{key}: {path} has the hash {digest}, and train.{hash_key} asks for {wanted}")
    return path, digest


def _checkpoint(key: str, path: Path) -> Path:
    """The folder of the checkpoint that a path names: itself, or the one that a finished run was tested with."""
    if not path.is_dir():
        raise ConfigError(f"{key}: {path}: there is no such folder")
    if (path / "config.json").exists():
        record = _read(key, path / "run.json")
        if record.get("status") != "finished":
            raise ConfigError(f"{key}: the run {path} is not finished; give one of the folders in {path}/checkpoints")
        path = path / "checkpoints" / str(record.get("results", {}).get("checkpoint"))
        if not path.is_dir():
            raise ConfigError(f"{key}: the checkpoint {path}, which its run was tested with, is gone")
        return path
    named = path.name.removeprefix("step-").isdecimal() and path.name != path.name.removeprefix("step-")
    if not named or not (_run_of(path) / "config.json").exists():
        raise ConfigError(
            f"{key}: {path} is neither the folder of a run nor that of a checkpoint in one, RUN/checkpoints/step-000100"
            f" with its {MANIFEST}"
        )
    return path


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.absolute().parent.parent


def _read(key: str, path: Path) -> dict[str, Any]:
    try:
        return read_json(path) or {}
    except RunnerError as error:
        raise ConfigError(f"{key}: {error}") from error


def options_of(key: str, checkpoint: Path) -> LMConfig:
    """The options of the model in a checkpoint, by the configuration of its run.

    Raises:
        ConfigError: it cannot be read; the error begins with the key that names the checkpoint.
    """
    file = _run_of(checkpoint) / "config.json"
    stored = _read(key, file)
    try:
        check_format(stored, file)
        return run_config({name: value for name, value in stored.items() if name != "format"}).model.options
    except RunnerError as error:
        raise ConfigError(f"{key}: {file}: {error}") from error


def _fit(checkpoint: Path, config: RunConfig) -> RunConfig:
    """The configuration, of a model with the parameters of the checkpoint or, converted, with what it can take."""
    theirs, own = options_of(KEY, checkpoint), config.model.options
    if config.train.convert is None:
        here, there = _shapes(own), _shapes(theirs)
        for name in {**here, **there}:
            if here.get(name) != there.get(name):
                found = [str(at[name]) if name in at else "missing" for at in (there, here)]
                raise ConfigError(
                    f"{KEY}: {checkpoint} is of another model: {name} is {found[0]} there, {found[1]} here"
                )
        return config
    try:
        with torch.device("meta"):
            source = LanguageModel(theirs)
            options = fitted(own, theirs, [layer.mixers for layer in source.stack.layers])  # type: ignore[misc]
            carry_over(source, LanguageModel(options), partial=config.train.convert == "partial")
    except ValueError as error:
        raise ConfigError(f"{KEY}: {checkpoint}: {error}") from error
    return replace(config, model=replace(config.model, options=options))


def _check_teacher(checkpoint: Path, config: RunConfig) -> None:
    """Refuse a teacher that the run's model cannot be trained to be as."""
    try:
        with torch.device("meta"):
            models = LanguageModel(options_of(TEACHER, checkpoint)), LanguageModel(config.model.options)
        check_pair(*models, of_layers=config.train.objective != "logits")
    except ValueError as error:
        raise ConfigError(f"{TEACHER}: {checkpoint}: {error}") from error


def _shapes(options: LMConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in LanguageModel(options).state_dict().items()}
