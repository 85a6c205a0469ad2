"""The form of a model's folder: the names in ``config.json``, and the manifest of what was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from seqarch.checkpoints.errors import CheckpointError
from seqarch.checkpoints.manifest import MANIFEST, manifest_digest, read_manifest
from seqarch.checkpoints.tokenizers import ByteTokenizer
from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.layers.modules.quantized import WeightFormat
from seqarch.models import LanguageModel, LMConfig, parse_pattern
from seqarch.models.quantization import formats_of, replace

OWN = "seqarch"
"""``model_type`` in the ``config.json`` of a model in seqarch's own form."""

FORMAT = 1
"""The version of that form: raised when a key or a file gets another name or meaning."""

KIND = "model"
"""What a manifest says it is of."""


def own_config(model: LanguageModel, dtype: torch.dtype, version: str) -> dict[str, Any]:
    """The ``config.json`` of a model in seqarch's own form.

    Raises:
        ValueError: an option of its config is none that JSON holds.
    """
    config = {
        "model_type": OWN,
        "format": FORMAT,
        "seqarch_version": version,
        "dtype": str(dtype).removeprefix("torch."),
        "plugins": _plugins(model),
        "model": asdict(model.config),
    }
    if formats := formats_of(model):
        config["quantization"] = {path: asdict(form) for path, form in formats.items()}
    if isinstance(model.tokenizer, ByteTokenizer):
        config["tokens"] = "bytes"
    try:
        same = LMConfig(**json.loads(json.dumps(config["model"]))) == model.config
    except (TypeError, ValueError) as error:
        raise ValueError(f"the model's config cannot be written as JSON: {error}") from error
    if not same:
        raise ValueError(f"the model's config does not come back from JSON as it is: {model.config}")
    return config


def tied_names(model: LanguageModel) -> set[str]:
    """Names of the head's tensors that are the embedding's, which files do not hold twice."""
    names = ("head.weight", "head.codes", "head.scales") if model.config.tie_embeddings else ()
    return {name for name in names if name in model.state_dict()}


def quantize_as(model: LanguageModel, config: Mapping[str, Any], file: Path) -> None:
    """Give a model on the meta device the quantised weights that ``config.json`` names.

    Raises:
        CheckpointError: it names something else than such weights of the model.
    """
    given = config.get("quantization", {})
    try:
        replace(model, {path: WeightFormat(**each) for path, each in given.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: quantization is not that of its model: {error}") from error


def _plugins(model: LanguageModel) -> list[str]:
    """The modules that register layers of the model which are not seqarch's own; those named by a path need none."""
    pattern = parse_pattern(model.config.pattern)
    names = {name for layer in pattern for name in (*layer.mixers, layer.channel or model.config.channel)}
    registered = {**MIXERS, **CHANNEL_MIXERS}
    modules = {registered[name].__module__ for name in names if name in registered} - {"__main__"}
    own = sorted(module for module in modules if not module.startswith("seqarch."))
    return list(dict.fromkeys([*(model.origin.plugins if model.origin is not None else ()), *own]))


def write_manifest(folder: Path, files: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, with the digests of its files by name."""
    manifest = {"files": dict(files), "state": {"kind": KIND, **state}}
    text = json.dumps({**manifest, "sha256": manifest_digest(manifest)}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def model_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a model that seqarch saved; ``None`` where the folder has none, or not what was written."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["state"].get("kind") != KIND:
        return None
    return manifest if all(Path(name).name == name for name in manifest["files"]) else None


def has_spoilt_manifest(folder: Path) -> bool:
    """Whether a folder's manifest is no JSON, or has the parts of one of seqarch's and is not what was written."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(content, dict) and {"files", "state"} <= content.keys() and read_manifest(folder) is None
