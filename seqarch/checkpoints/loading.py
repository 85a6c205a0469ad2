"""The trained model of a run's folder, by what the runner wrote there: configuration, record and checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from seqarch.checkpoints.building import build, fill
from seqarch.checkpoints.errors import MALFORMED, CheckpointError
from seqarch.checkpoints.manifest import (
    FORMAT,
    MANIFEST,
    checkpoint_name,
    checkpoints_by_step,
    damage,
    file_digest,
    read_json,
    read_manifest,
)
from seqarch.checkpoints.origin import Origin, carried_files
from seqarch.checkpoints.tensor_reader import TensorReader
from seqarch.checkpoints.tokenizers import tokenizer_of
from seqarch.models import LanguageModel

PART = "model."
"""What the names of the model's tensors begin with, beside those of the optimizer and others."""

EMBEDDING = "embedding.weight"
"""Whose rows are the vocabulary, which the configuration leaves to the task."""


def load(
    folder: str | PathLike[str],
    *,
    step: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """The trained model of a run's folder, in eval mode, with its ``config`` and, of text, its ``tokenizer``.

    Of a finished run it is the model that was tested, the best on validation or the last (``train.eval_checkpoint``);
    of one that was stopped, or goes on, that of the latest checkpoint. Where the model has layers that are not
    registered yet, the plug-ins are imported that installed packages offer as entry points of ``seqarch.plugins``, and
    the modules that the run's ``plugins`` name. No other code that the folder's files name is run.

    Args:
        folder: of the run, with its ``config.json``.
        step: of another checkpoint.
        device: to load to; by default torch's own.
        dtype: of the parameters, as ``model.to(dtype)`` gives it; by default that of the checkpoint.

    Raises:
        CheckpointError: the folder is no run's or of another format, there is no such checkpoint, it is damaged, or its
            tensors are not those of the model that the configuration describes.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config is None:
        there = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(f"{folder} is no run's folder: {there}")
    if (found := config.get("format", 1)) != FORMAT:
        raise CheckpointError(f"{folder / 'config.json'} is of format {found!r}, and this version reads {FORMAT}")
    record = read_json(folder / "run.json") or {}
    path = choose_checkpoint(folder, record, step)
    tensors = read_tensors(path, PART)
    if EMBEDDING not in tensors or tensors[EMBEDDING].ndim != 2:
        raise CheckpointError(f"{path} holds no language model: it has no matrix {PART}{EMBEDDING}")
    plugins = [*config.get("plugins", []), *config.get("imports", [])]  # imports: the former name.
    model = build(_options(config, len(tensors[EMBEDDING]), folder), plugins, folder)
    fill(model, tensors, path, folder / "config.json")
    del tensors
    model.tokenizer = tokenizer_of(folder, record, model.config.vocab_size)
    manifest = {str(path.relative_to(folder) / MANIFEST): file_digest(path / MANIFEST)}
    model.origin = Origin(
        str(folder), "run", path.name, manifest, plugins=tuple(plugins), carried=carried_files(folder)
    )
    return model.to(torch.get_default_device() if device is None else device, dtype).eval()


def _options(config: Mapping[str, Any], vocab_size: int, folder: Path) -> dict[str, Any]:
    """Those of the model's ``LMConfig``; ``name`` is the runner's."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(f"cannot build the model of {folder}: config.json has no 'model', a JSON object")
    return {"vocab_size": vocab_size, **{name: value for name, value in model.items() if name != "name"}}


def choose_checkpoint(folder: Path, record: Mapping[str, Any], step: int | None) -> Path:
    """The folder of the checkpoint of a step, or of the one that a run's results are of, or of the latest.

    Raises:
        CheckpointError: it is not there.
    """
    there = checkpoints_by_step(folder / "checkpoints")
    if not there:
        raise CheckpointError(f"{folder} has no checkpoint yet: nothing lies in {folder / 'checkpoints'}")
    results = record.get("results")
    tested = results.get("checkpoint") if isinstance(results, Mapping) else None
    if step is None and (record.get("status") != "finished" or tested is None):
        return next(iter(there.values()))
    name = str(tested) if step is None else checkpoint_name(step)
    path = next((path for path in there.values() if path.name == name), None)
    if path is None:
        what = "the checkpoint that its results are of" if step is None else "one of that step"
        others = ", ".join(str(each) for each in sorted(there))
        raise CheckpointError(f"{folder} has no {name}, {what}: expected step to be one of {others}")
    return path


def read_tensors(path: Path, part: str = "") -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with ``part``, by what follows it, as they were stored.

    Raises:
        CheckpointError: a file of it is missing or not what was written.
    """
    manifest = read_manifest(path)
    listed = manifest["files"] if manifest else {}
    found = {name: file_digest(path / name) for name in listed if (path / name).is_file()}
    if problem := damage(manifest, found):
        raise CheckpointError(f"checkpoint {path} is damaged: {problem}")
    reader = TensorReader(path)
    wanted = {name: entry for name, entry in reader.tensors().items() if name.startswith(part)}
    try:
        content: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu") for name, entry in wanted.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            load_tensors(content, storage_reader=reader, no_dist=True)
    except MALFORMED as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"cannot load checkpoint {path}: {type(error).__name__}, {first}") from error
    return {name.removeprefix(part): tensor for name, tensor in content.items()}


__all__ = ["load"]
