"""States in files: safetensors that only the model they belong to takes back.

The tensors of a state are the file's tensors; its metadata holds what the state is made of, the fingerprint of the
model and the version of states. Nothing is unpickled: named tuples are looked up among those of the model's own states.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seqarch.layers.channel.offloaded import OffloadedExperts
from seqarch.layers.mixer import first_tensor
from seqarch.layers.modules.kv_cache import PackedKV
from seqarch.layers.rows import row_count
from seqarch.layers.sparse_attention.row_attention import PackedRows
from seqarch.models import LanguageModel
from seqarch.models.stack_layer import StackLayer
from seqarch.ops.dispatch.checks import show

STATE_VERSION = 1
"""Of what states mean: raised with every change after which an older state would continue otherwise."""

_TUPLES = {"tuple": tuple, "list": list}


class StateError(ValueError):
    """A state that does not belong to the model, or a file that holds none; its text says which."""


def fingerprint(model: LanguageModel) -> str:
    """A SHA-256 of the model: of its config and of the names, dtypes, shapes and numbers of its tensors.

    It reads all parameters, as fast as the processor hashes; whoever saves many states computes it once.
    """
    digest = hashlib.sha256()
    options = {field.name: getattr(model.config, field.name) for field in fields(model.config)}
    digest.update(json.dumps(options, sort_keys=True, default=repr).encode())
    away = dict(_experts_away(model))
    forms = {name: experts.form[own] for name, (experts, own) in away.items()}
    for name, tensor in sorted((model.state_dict() | forms).items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        for part in [tensor] if name not in away else away[name][0].all_of(away[name][1]):
            plain = part.detach().cpu().contiguous()
            digest.update(plain.flatten().view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()


def _experts_away(model: LanguageModel) -> Iterator[tuple[str, tuple[OffloadedExperts, str]]]:
    """Experts that are not all in memory, with a matrix's own name, by the name that it has in a whole model."""
    for path, module in model.named_modules():
        if isinstance(module, OffloadedExperts):
            yield from ((f"{path.rpartition('.')[0]}.{own}", (module, own)) for own in module.form)


def save(state: Any, path: str | PathLike[str], model: LanguageModel, *, model_fingerprint: str | None = None) -> None:
    """Write a state of a model to a file, which takes the place of what was there once it is complete.

    Args:
        path: of the file, usually ``*.safetensors``.
        model_fingerprint: what :func:`fingerprint` gave for this model as it is, where it is known.

    Raises:
        StateError: it is no state of this model, or has a part that cannot be named in a file.
        OSError: it cannot be written.
    """
    _check(state, model, "save")
    kinds = _kinds(model)
    tensors: dict[str, Tensor] = {}
    form = _taken_apart(state, "state", kinds, tensors)
    metadata = {
        "seqarch_state": str(STATE_VERSION),
        "model": model_fingerprint or fingerprint(model),
        "form": json.dumps(form),
    }
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata=metadata)
        part.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def load(path: str | PathLike[str], model: LanguageModel, *, model_fingerprint: str | None = None) -> Any:
    """The state in a file, on the model's device, to the bit as it was saved.

    Args:
        model_fingerprint: as of :func:`save`.

    Raises:
        StateError: the file is missing or damaged, holds no state, one of another model or version of states, or one
            whose parts are not of the shapes that this model's states have.
    """
    path, device = Path(path), first_tensor(model).device
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, model, model_fingerprint)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} cannot be read as a state: {error}") from error
    try:
        state = _put_together(json.loads(metadata["form"]), _kinds(model), tensors)
    except (LookupError, TypeError, ValueError) as error:
        raise StateError(f"{path} is damaged: its description of the state does not fit its tensors") from error
    _check(state, model, str(path))
    return state


def _check_metadata(path: Path, metadata: dict[str, str], model: LanguageModel, known: str | None) -> None:
    version = metadata.get("seqarch_state")
    if version is None or not metadata.keys() >= {"model", "form"}:
        raise StateError(f"{path} holds no state: seqarch.state.save did not write it")
    if version != str(STATE_VERSION):
        raise StateError(f"{path} holds a state of version {version}, expected {STATE_VERSION}: read the prompt again")
    if metadata["model"] != (own := known or fingerprint(model)):
        raise StateError(
            f"{path} holds a state of another model, {metadata['model'][:12]}; this one is {own[:12]}: config or"
            " parameters differ"
        )


def _check(state: Any, model: LanguageModel, where: str) -> None:
    """Raise unless each mixer takes its part, all of as many rows."""
    try:
        rows = row_count(state)
        layers: list[list[Any]] = [[*each.mixers] for each in model.stack.layers if isinstance(each, StackLayer)]
        if not isinstance(state, tuple) or len(state) != len(layers):
            raise ValueError(f"{len(layers)} layers were expected, the state is {show(state)}")
        for own, mixers in zip(state, layers, strict=True):
            for part, mixer in zip(own, mixers, strict=True):
                mixer.check_state(part, rows)
    except (ValueError, TypeError, AttributeError) as error:
        raise StateError(f"{where}: not a state of this model: {error}") from error


def _kinds(model: LanguageModel) -> dict[str, Any]:
    """The named tuples that states of the model are made of, by their names."""
    found = {kind.__name__: kind for kind in _named_tuples(model.init_state(0, device="meta"))}
    return {**_TUPLES, PackedKV.__name__: PackedKV, PackedRows.__name__: PackedRows, **found}


def _named_tuples(part: Any) -> Iterator[type]:
    if hasattr(part, "_fields"):
        yield type(part)
    if isinstance(part, (tuple, list)):
        for each in part:
            yield from _named_tuples(each)


def _taken_apart(part: Any, path: str, kinds: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """What JSON says of a part; its tensors go to ``tensors``, by their paths."""
    if isinstance(part, Tensor):
        own = part.detach().to("cpu", copy=True).contiguous()  # the format wants each in memory of its own
        tensors[path] = own
        return {"tensor": path}
    if part is None or type(part) in (int, float, bool, str):
        return part
    name = type(part).__name__
    if kinds.get(name) is not type(part):
        raise StateError(
            f"{path} is {show(part)}, which a file of states cannot hold: expected tensors, numbers and"
            f" {', '.join(sorted(kinds))}"
        )
    names = part._fields if hasattr(part, "_fields") else range(len(part))
    parts = zip(names, part, strict=True)
    return {"kind": name, "parts": [_taken_apart(each, f"{path}.{of}", kinds, tensors) for of, each in parts]}


def _put_together(form: Any, kinds: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if not isinstance(form, dict):
        return form
    if "tensor" in form:
        return tensors[form["tensor"]]
    kind, parts = kinds[form["kind"]], [_put_together(each, kinds, tensors) for each in form["parts"]]
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
