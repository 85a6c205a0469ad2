"""``LanguageModel.from_pretrained``: what a folder is, and the model that it holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from glob import escape
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from seqarch.checkpoints.building import build, fill
from seqarch.checkpoints.errors import CheckpointError
from seqarch.checkpoints.loading import load
from seqarch.checkpoints.manifest import MANIFEST, checkpoints_by_step, damage, file_digest, read_json
from seqarch.checkpoints.origin import Origin, carried_files, file_entry, hub_revision
from seqarch.checkpoints.tokenizers import FILE, Tokenizer, tokenizer_of
from seqarch.interop import FAMILIES, lm_config, text_settings, weight_map
from seqarch.interop.weights import WeightMap, rule
from seqarch.layers.channel.expert_cache import Policy
from seqarch.models import LanguageModel
from seqarch.ops.dispatch.checks import unknown_name
from seqarch.pretrained.filling import filling, most_numbers
from seqarch.pretrained.form import FORMAT, OWN, has_spoilt_manifest, model_manifest, quantize_as, tied_names
from seqarch.pretrained.offloading import Offload, offload_experts, offload_of
from seqarch.pretrained.sources import check_names, sources
from seqarch.pretrained.tensor_files import DTYPES, StoredTensor, stored_tensors


def from_pretrained(
    path: str | PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    step: int | None = None,
    verify: bool = False,
    experts_in_memory: int | None = None,
    expert_policy: str | Callable[[], Policy] = "lru",
) -> LanguageModel:
    """The model of a folder, in eval mode; see :meth:`seqarch.LanguageModel.from_pretrained`."""
    if dtype is not None and not (dtype in DTYPES.values() and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating point torch.dtype, got {dtype!r}; expected one of at least 16 bits")
    folder, device = Path(path), torch.get_default_device() if device is None else torch.device(device)
    offload = offload_of(experts_in_memory, expert_policy, device)
    if folder.parent.name == "checkpoints" and (number := _step_of(folder)) is not None:
        folder, step = folder.parent.parent, number if step is None else step
    config = read_json(folder / "config.json") if folder.is_dir() else None
    if config is None:
        raise CheckpointError(_no_model(folder))
    config = text_settings(config)
    kind = config.get("model_type")
    if kind is None and "model" in config:
        if offload is not None:
            raise CheckpointError(
                f"{folder} is a run's folder, whose experts are not read one by one: load it, save_pretrained(OTHER),"
                " and read that with experts_in_memory"
            )
        return load(folder, step=step, device=device, dtype=dtype)
    if step is not None:
        raise CheckpointError(f"{folder} is no run's folder, which alone has a step: got step={step}")
    _check_files(folder, verify)
    if not isinstance(kind, str):
        raise CheckpointError(f"{folder / 'config.json'} has no model_type, a family's name, and no run's 'model'")
    if kind != OWN and kind not in FAMILIES:
        raise CheckpointError(f"{folder / 'config.json'}: {unknown_name('model_type', kind, [*FAMILIES, OWN])}")
    model = (_own if kind == OWN else _theirs)(folder, config, dtype, device, offload)
    return (model if device.type == "cpu" else model.to(device)).eval()


def _own(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device, offload: Offload | None
) -> LanguageModel:
    """A model that seqarch saved in its own form."""
    file, options = folder / "config.json", config.get("model")
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{file} is of format {config.get('format')!r}, and this version reads {FORMAT}")
    if not isinstance(options, dict):
        raise CheckpointError(f"{file} has no 'model', a JSON object")
    plugins = config.get("plugins", [])
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise CheckpointError(f"{file}: plugins is {plugins!r}, expected a list of modules' names")
    stored = stored_tensors(folder)
    model = build(options, plugins, folder, dtype or most_numbers(stored))
    quantize_as(model, config, file)
    names = [name for name in model.state_dict() if name not in tied_names(model)]
    check_names(set(names) - set(stored), set(stored) - set(names), folder)
    form = filling(model, dtype, device, folder)
    rules = offload_experts(model, [rule(name, name) for name in names], stored, form, offload)
    made = form.apply_all(rules, stored)
    made.update((name, made[name.replace("head.", "embedding.")]) for name in tied_names(model))
    fill(model, made, folder, file)
    model.tokenizer = _tokenizer(folder, {"tokens": config.get("tokens")}, model.config.vocab_size)
    model.origin = _origin(folder, OWN, stored, plugins=tuple(plugins))
    return model


def _theirs(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device, offload: Offload | None
) -> LanguageModel:
    """A model of a family that :mod:`seqarch.interop` knows."""
    file, family = folder / "config.json", config["model_type"]
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(f"{file} has a quantization_config ({method}): quantised models are not read")
    try:
        ours, table = lm_config(config), weight_map(config)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    stored = stored_tensors(folder)
    options = {field.name: getattr(ours, field.name) for field in fields(ours)}
    model = build(options, (), folder, dtype or most_numbers(stored))
    theirs = sources(family, table, stored, folder)
    form, shared = filling(model, dtype, device, folder), _shared(table, theirs)
    rules = offload_experts(model, table.rules, theirs, form, offload)
    made = form.apply_all((each for each in rules if each.ours[0] not in shared), theirs)
    made.update((copy, made[original]) for copy, original in shared.items())
    fill(model, made, folder, file)
    model.tokenizer = _tokenizer(folder, {}, model.config.vocab_size)
    model.origin = _origin(folder, family, stored, settings=config)
    return model


def _shared(table: WeightMap, theirs: Mapping[str, Any]) -> dict[str, str]:
    """Our copies of tensors that files hold once, by the names of what they repeat."""
    plain = {rule.theirs[0]: rule.ours[0] for rule in table.rules if len(rule.theirs) == 1 and not rule.steps}
    tied = table.tied.items() - table.more.items()
    pairs = [(copy, original) for copy, original in tied if theirs[copy] is theirs[original]]
    return {plain[copy]: plain[original] for copy, original in pairs if {copy, original} <= plain.keys()}


def _origin(folder: Path, family: str, stored: Mapping[str, StoredTensor], **others: Any) -> Origin:
    names = sorted({"config.json", *(tensor.file.name for tensor in stored.values())})
    known = (model_manifest(folder) or {}).get("files", {})
    files = {name: known.get(name) or file_entry(folder / name) for name in names}
    files["config.json"] = file_digest(folder / "config.json")
    return Origin(str(folder), family, hub_revision(folder), files, carried=carried_files(folder), **others)


def _check_files(folder: Path, verify: bool) -> None:
    """Raise where the files are not those that were saved, as far as their manifest says: by size, or by hash."""
    manifest = model_manifest(folder)
    if manifest is None:
        if has_spoilt_manifest(folder):
            raise CheckpointError(
                f"{folder / MANIFEST} is not what was written: put the former one back, or remove it to read the folder"
                " without comparing its files"
            )
        if verify:
            raise CheckpointError(f"{folder} has no manifest of seqarch's with the hashes of its files to compare")
        return
    names = [name for name in manifest["files"] if verify or name.endswith(".safetensors")]
    there = [name for name in names if (folder / name).is_file()]
    if verify:
        found = {name: file_digest(folder / name) for name in there}
    else:
        found = {name: {**manifest["files"][name], "bytes": (folder / name).stat().st_size} for name in there}
    expected = {**manifest, "files": {name: manifest["files"][name] for name in names}}
    if problem := damage(expected, found):
        raise CheckpointError(f"{folder} is damaged: {problem}")


def _tokenizer(folder: Path, task: Mapping[str, Any], vocab_size: int) -> Tokenizer | None:
    if (folder / FILE).exists() and find_spec("tokenizers") is None:
        warnings.warn(f"{folder / FILE} needs the package tokenizers: the model has no tokenizer", stacklevel=4)
        return None
    return tokenizer_of(folder, {"task": task}, vocab_size)


def _step_of(folder: Path) -> int | None:
    """The step of a folder that is named as a run's checkpoint is."""
    return next((step for step, path in checkpoints_by_step(folder.parent).items() if path.name == folder.name), None)


def _is_whole(folder: Path) -> bool:
    """Whether all files that were saved in a folder are there."""
    manifest = model_manifest(folder)
    return manifest is not None and all((folder / name).is_file() for name in manifest["files"])


def _no_model(folder: Path) -> str:
    if folder.exists() and not folder.is_dir():
        return f"{folder} is no model's folder: it is a file"
    if not folder.exists():
        if former := [each for each in folder.parent.glob(f".{escape(folder.name)}.*.former") if _is_whole(each)]:
            return f"{folder} is no model's folder: its saving was killed; the former model is {former[-1]}: rename it"
        hub = "" if folder.is_absolute() else "; a model of a hub is to be downloaded first"
        return f"{folder} is no model's folder: there is no such folder{hub}"
    if revisions := sorted(path for path in folder.glob("snapshots/*") if path.is_dir()):
        return f"{folder} is no model's folder, but the cache of one: expected {revisions[-1]}"
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is no model's folder: it has an adapter (adapter_config.json) and no config.json"
    return f"{folder} is no model's folder: it has no config.json"
