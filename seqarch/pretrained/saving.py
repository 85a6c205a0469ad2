"""``model.save_pretrained``: a model as a folder in seqarch's own form or in that of a family of ``transformers``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import seqarch
from seqarch.checkpoints.building import build, main_dtype
from seqarch.checkpoints.manifest import file_digest
from seqarch.checkpoints.tokenizers import FILE, FileTokenizer
from seqarch.interop import FAMILIES, weight_map
from seqarch.interop.file_names import written_names
from seqarch.models import LanguageModel
from seqarch.models.quantization import formats_of, replace
from seqarch.ops.dispatch.checks import unknown_name
from seqarch.pretrained.form import own_config, tied_names, write_manifest
from seqarch.pretrained.place import check_place, written_beside
from seqarch.pretrained.shards import Shards, size_in_bytes
from seqarch.pretrained.tensor_files import DTYPES
from seqarch.pretrained.their_settings import their_settings


def save_pretrained(
    model: LanguageModel,
    path: str | PathLike[str],
    *,
    family: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model's folder; see :meth:`seqarch.LanguageModel.save_pretrained`."""
    folder, limit = Path(path).absolute(), size_in_bytes(max_shard_size)
    if family is not None and family not in list(FAMILIES):
        raise unknown_name("family", family, FAMILIES)
    check_place(folder)
    if model.expert_store is not None:
        raise ValueError("the model's experts are in another folder's files: read it whole, without experts_in_memory")
    state = model.state_dict()
    if nowhere := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"the model is on the meta device, without numbers to save: {nowhere[0]} is")
    if family is not None and (formats := formats_of(model)):
        first = next(iter(formats))
        raise ValueError(f"{first} is quantised, which no family's folder holds: dequantize the model first")
    _check_described(model, state)
    _check_tied(model, state)
    dtype = main_dtype((tensor.dtype, tensor.numel()) for tensor in state.values())
    if family is None:
        config, tensors = own_config(model, dtype, seqarch.__version__), _own_tensors(model, state)
    else:
        config = their_settings(family, model, dtype)
        tensors = _their_tensors(family, config, state)
    with written_beside(folder) as made:
        shards = Shards(made, limit)
        for name, tensor in tensors:
            shards.add(name, tensor)
        shards.close()
        _write_beside(made, model, config)
        files = {each.name: file_digest(each, synced=True) for each in sorted(made.iterdir())}
        origin = None if model.origin is None else model.origin.record()
        write_manifest(made, files, {"seqarch": seqarch.__version__, "family": family, "origin": origin})


def _write_beside(folder: Path, model: LanguageModel, config: Mapping[str, Any]) -> None:
    """The files beside the tensors."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in (model.origin.carried if model.origin is not None else {}).items():
        (folder / name).write_bytes(content)
    if isinstance(model.tokenizer, FileTokenizer) and not (folder / FILE).exists():
        model.tokenizer.tokenizer.save(str(folder / FILE))


def _own_tensors(model: LanguageModel, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    tied = tied_names(model)
    return ((name, tensor) for name, tensor in state.items() if name not in tied)


def _their_tensors(family: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Those of the family's files, rule by rule, and those that follow from the configuration."""
    table = weight_map(config)
    yield from table.computed_tensors(next(iter(state.values()))).items()
    for rule in table.rules:
        for name, tensor in rule.to_theirs({own: state[own] for own in rule.ours}).items():
            if name not in table.tied:
                yield from _pieces(written_names(family, name), tensor)


def _pieces(names: tuple[str, ...], tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """A tensor of theirs as files hold it: whole, in parts of equal size, or expert by expert."""
    if "{}" not in names[0]:
        return zip(names, tensor.tensor_split(len(names)), strict=True)
    each = (zip(names, expert.tensor_split(len(names)), strict=True) for expert in tensor)
    return ((name.format(number), part) for number, parts in enumerate(each) for name, part in parts)


def _check_tied(model: LanguageModel, state: Mapping[str, Tensor]) -> None:
    """Raise unless each tensor has memory of its own, but for the head's of tied embeddings, and is of a known dtype.

    Raises:
        ValueError: it has not, so that the folder would hold another model; the tensors are named.
    """
    tied, of_memory = tied_names(model), {}
    for name in sorted(tied):
        other = name.replace("head.", "embedding.")
        if other not in state or not torch.equal(state[name], state[other]):
            raise ValueError(f"tie_embeddings is true, but {name} and {other} hold different numbers")
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{name} is of {tensor.dtype}, expected one of {', '.join(map(str, DTYPES.values()))}")
        if not tensor.numel() or name in tied:
            continue
        other = of_memory.setdefault((tensor.device, tensor.data_ptr()), name)
        if other != name and state[other].shape == tensor.shape:
            raise ValueError(f"{other} and {name} are one tensor, which the model's config does not say")


def _check_described(model: LanguageModel, state: Mapping[str, Tensor]) -> None:
    """Raise unless the model's config describes its tensors, as it must for the folder to be read again.

    Raises:
        ValueError: it does not, since modules were put in place of others, say; the first tensors are named.
    """
    options = {field.name: getattr(model.config, field.name) for field in fields(model.config)}
    other_model = build(options, (), Path("the model's config"))
    replace(other_model, formats_of(model))
    described = other_model.state_dict()
    own, other = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (state, described))
    differ = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if differ:
        shown = ", ".join(
            f"{name} {own.get(name, 'absent')} (by its config {other.get(name, 'absent')})" for name in differ[:3]
        )
        raise ValueError(f"the model is not the one that its config describes: {shown}")
