"""What a run starts from: the checkpoint that ``train.start_from`` names, known by its content.

It is found, checked and compared with the run's model before anything is written, and from then on named by its folder
and by the hash of its manifest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.config.schema import RunConfig, check_format, folder_path, run_config
from experiments.util.errors import ConfigError, RunnerError
from experiments.util.files import read_json
from seqarch.checkpoints.manifest import MANIFEST, damage, file_digest, manifest_digest, read_manifest
from seqarch.models import LanguageModel, LMConfig

KEY = "train.start_from"


def with_start(config: RunConfig) -> RunConfig:
    """The configuration with its start named by the folder of a checkpoint and by the hash of its manifest.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, its model does not fit, or it is not the one that
            ``train.start_sha256`` asks for.
    """
    train = config.train
    if train.start_from is None:
        return config
    path = _checkpoint(folder_path(KEY, train.start_from))
    manifest = read_manifest(path)
    listed = manifest["files"] if manifest else {}
    there = {name: file_digest(path / name) for name in listed if (path / name).is_file()}
    if problem := damage(manifest, there):
        raise ConfigError(f"{KEY}: checkpoint {path} is damaged: {problem}")
    digest = manifest_digest(manifest or {})
    if train.start_sha256 not in (None, digest):
        raise ConfigError(f"{KEY}: {path} has the hash {digest}, and train.start_sha256 asks for {train.start_sha256}")
    _check_fit(path, config.model.options)
    return replace(config, train=replace(train, start_from=str(path), start_sha256=digest))


def _checkpoint(path: Path) -> Path:
    """The folder of the checkpoint that a path names: itself, or the one that a finished run was tested with."""
    if not path.is_dir():
        raise ConfigError(f"{KEY}: {path}: there is no such folder")
    if (path / "config.json").exists():
        record = _read(path / "run.json")
        if record.get("status") != "finished":
            raise ConfigError(f"{KEY}: the run {path} is not finished; give one of the folders in {path}/checkpoints")
        path = path / "checkpoints" / str(record.get("results", {}).get("checkpoint"))
        if not path.is_dir():
            raise ConfigError(f"{KEY}: the checkpoint {path}, which its run was tested with, is gone")
        return path
    named = path.name.removeprefix("step-").isdecimal() and path.name != path.name.removeprefix("step-")
    if not named or not (_run_of(path) / "config.json").exists():
        raise ConfigError(
            f"{KEY}: {path} is neither the folder of a run nor that of a checkpoint in one, RUN/checkpoints/step-000100"
            f" with its {MANIFEST}"
        )
    return path


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.absolute().parent.parent


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) or {}
    except RunnerError as error:
        raise ConfigError(f"{KEY}: {error}") from error


def _check_fit(checkpoint: Path, options: LMConfig) -> None:
    """Refuse a checkpoint of a run whose model has other parameters."""
    file = _run_of(checkpoint) / "config.json"
    stored = _read(file)
    try:
        check_format(stored, file)
        theirs = run_config({name: value for name, value in stored.items() if name != "format"}).model.options
    except RunnerError as error:
        raise ConfigError(f"{KEY}: {file}: {error}") from error
    here, there = _shapes(options), _shapes(theirs)
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            found = [str(shape) if (shape := shapes.get(name)) is not None else "missing" for shapes in (there, here)]
            raise ConfigError(f"{KEY}: {checkpoint} is of another model: {name} is {found[0]} there, {found[1]} here")


def _shapes(options: LMConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in LanguageModel(options).state_dict().items()}
