"""How ``transformers`` makes a model of a folder of ours, and what it writes as one of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import seqarch
from seqarch.checkpoints.building import build, wide_parameters
from seqarch.checkpoints.errors import CheckpointError
from seqarch.checkpoints.manifest import MANIFEST, file_digest
from seqarch.interop.hf.config import SeqarchConfig
from seqarch.models import LanguageModel, LMConfig
from seqarch.pretrained.form import model_manifest, write_manifest

PREFIX = "model."
"""Before the names of our tensors in the state dict of the model around them; files have them without it."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
"""The files of tensors that ``transformers`` writes."""


def language_model(config: SeqarchConfig) -> LanguageModel:
    """The model of a configuration: initialised, or with room for tensors alone where ``from_pretrained`` asks for it.

    It is in torch's default dtype, which ``from_pretrained`` sets; in 16 bits, mixers' own parameters, such as
    ``A_log``, stay float32, in which mixers compute with them.

    Raises:
        ValueError: no model can be built of the configuration.
    """
    dtype, to_be_filled = torch.get_default_dtype(), torch.empty(0).is_meta
    with _default_dtype(torch.float32):
        model = build(config.model, config.plugins, Path(config.name_or_path or "a SeqarchConfig"))
        if not to_be_filled:
            model = LanguageModel(LMConfig(**config.model))
    model.to(dtype)
    if torch.finfo(dtype).bits < 32:
        wide = wide_parameters(model)
        for name, parameter in model.named_parameters():
            if name in wide:
                parameter.data = parameter.data.float()
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def file_names(state: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """A state dict of the model around ours under the names of files, where tied embeddings are once."""
    named = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if not (tied and name == "head.weight")}


def add_prefix(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a state dict have its names from files too, as ``Trainer`` reads them when it resumes."""
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        if own.split(".")[0] in module.model._modules:
            state[f"{prefix}{PREFIX}{own}"] = state.pop(name)


def check_loaded(info: Any, tied: Mapping[str, str], folder: str) -> None:
    """Raise where a folder lacks tensors of its model, has others, or some of another shape.

    Args:
        info: what ``transformers`` found while it loaded. Shapes are taken out of an ``info`` that is refused, since
            ``transformers`` would raise an error of its own for them.

    Raises:
        CheckpointError: it does; the first ones are named.
    """
    problems = {
        "is without tensors that its config.json describes": sorted(set(info.missing_keys) - tied.keys()),
        "has tensors that its config.json does not describe": sorted(info.unexpected_keys),
        "does not fit its config.json": [
            f"{name.removeprefix(PREFIX)} is {list(found)}, expected {list(expected)}"
            for name, found, expected in sorted(info.mismatched_keys)
        ],
    }
    for problem, names in problems.items():
        if names:
            info.mismatched_keys.clear()
            raise CheckpointError(f"{folder} {problem}: {', '.join(name.removeprefix(PREFIX) for name in names[:3])}")


def record(folder: Path, model: LanguageModel) -> None:
    """Write the manifest of a model's folder after ``transformers`` has written the model there.

    What an earlier saving has put there, as a tokenizer, stays in the manifest as it was; a manifest of somebody else's
    stays as it is.
    """
    earlier = model_manifest(folder)
    if (folder / MANIFEST).exists() and earlier is None:
        return
    before = (earlier or {}).get("files", {})
    names = ["config.json", "generation_config.json", SINGLE, INDEX]
    names += sorted(each.name for each in folder.iterdir() if SHARD.fullmatch(each.name))
    found = {name: file_digest(folder / name) for name in names if (folder / name).is_file()}
    former = [name for name in (SINGLE, INDEX) if name in found and found[name] == before.get(name)]
    if {SINGLE, INDEX} <= found.keys() and len(former) == 1:  # one file now and several before, or the other way round
        (folder / former[0]).unlink()
        del found[former[0]]
    files = {**{name: entry for name, entry in before.items() if (folder / name).is_file()}, **found}
    origin = None if model.origin is None else model.origin.record()
    write_manifest(folder, files, {"seqarch": seqarch.__version__, "family": None, "origin": origin})


def generation_settings(model: LanguageModel) -> dict[str, Any] | None:
    """What ``generation_config.json`` said in the folder that the model is from."""
    carried = {} if model.origin is None else model.origin.carried
    return json.loads(carried["generation_config.json"]) if "generation_config.json" in carried else None


def carry(folder: Path, model: LanguageModel) -> None:
    """Write what went along with the model, such as its tokenizer, where nothing of that name is yet."""
    for name, content in (model.origin.carried if model.origin is not None else {}).items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)
