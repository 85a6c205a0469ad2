"""``save_gguf``: a model as the file that llama.cpp reads."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqarch.checkpoints.building import main_dtype
from seqarch.checkpoints.tokenizers import FileTokenizer
from seqarch.interop import FAMILIES, weight_map
from seqarch.interop.file_names import written_names
from seqarch.models import LanguageModel
from seqarch.models.quantization import formats_of
from seqarch.ops.dispatch.checks import unknown_name
from seqarch.pretrained.gguf_architectures import ARCHITECTURES
from seqarch.pretrained.gguf_model import Architecture, Model
from seqarch.pretrained.gguf_tokenizer import Vocabulary, vocabulary
from seqarch.pretrained.their_settings import their_settings

FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
"""llama.cpp's number of the dtype that matrices have in a file."""

WIDE = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "ssm_conv1d.weight",
    "shortconv.conv.weight",
    "time_mix_lerp_fused.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
)
"""Ends of the names of matrices that are float32 in every file, as all vectors are."""


def save_gguf(
    model: LanguageModel,
    path: str | PathLike[str],
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    pre: str | None = None,
) -> None:
    """Write a model as a GGUF file, with its tokenizer where it has a ``tokenizer.json``.

    It needs the package ``gguf``. Tensors are changed and written one by one, and the file takes its name when it is
    whole.

    Args:
        path: of a file that is not there yet.
        family: of :data:`seqarch.pretrained.gguf_architectures.ARCHITECTURES`; by default that which it was read from.
        dtype: of matrices, float32, float16 or bfloat16; by default that of most of the model's numbers. Vectors,
            norms, routers and short convolutions are float32.
        pre: llama.cpp's name of how the tokenizer cuts text into words, where it is not known here.

    Raises:
        ValueError: llama.cpp has no such model, something lies at the path, or the tokenizer is of another kind.
        OSError: it cannot be written.
    """
    path = Path(path).absolute()
    if path.exists() or path.is_symlink():
        raise ValueError(f"cannot write {path}: it is there already; give the path of a new file")
    if family is None and model.origin is not None and model.origin.family in FAMILIES:
        family = model.origin.family
    if family is None:
        raise ValueError(f"the model is not read from a family's folder: name its family, {' or '.join(ARCHITECTURES)}")
    if family not in ARCHITECTURES:
        raise unknown_name("family", family, ARCHITECTURES)
    if formats := formats_of(model):
        raise ValueError(f"{next(iter(formats))} is quantised: dequantize the model first")
    state = model.state_dict()
    dtype = dtype or main_dtype((tensor.dtype, tensor.numel()) for tensor in state.values())
    if dtype not in FILE_TYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, FILE_TYPES))}")
    config = their_settings(family, model, dtype)
    module = FAMILIES[family]
    settings = module.Settings.read(config)
    described = Model(settings, config, module.lm_config(settings))
    words = vocabulary(model, pre) if isinstance(model.tokenizer, FileTokenizer) else None
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        _write(made, ARCHITECTURES[family], described, state, dtype, words, _name(model, path))
        made.rename(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def _name(model: LanguageModel, path: Path) -> str:
    return path.stem if model.origin is None else Path(model.origin.folder).resolve().name


def _write(
    path: Path,
    architecture: Architecture,
    model: Model,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    words: Vocabulary | None,
    name: str,
) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFWriter

    writer = GGUFWriter(path, architecture.name_of(model))
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_metadata(writer, architecture, model)
    _add_tokenizer(writer, words, architecture.name_of(model), model.settings.vocab_size)
    meta = {each: tensor.to("meta") for each, tensor in state.items()}
    for stored_name, shape, stored_dtype in _forms(_tensors(architecture, model, meta), dtype):
        _add_tensor(writer, stored_name, shape, stored_dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for stored_name, tensor in _tensors(architecture, model, state):
            tensor = tensor.to(_stored_dtype(stored_name, tensor, dtype)).contiguous()
            writer.write_tensor_data(tensor.view(torch.uint8).numpy())
    finally:
        writer.close()


def _forms(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
    for name, tensor in tensors:
        yield name, tensor.shape, _stored_dtype(name, tensor, dtype)


def _add_tensor(writer: Any, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType as Kind

    kind = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}[dtype]
    size = shape.numel() * dtype.itemsize
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    wide = tensor.ndim < 2 or not name.endswith(".weight") or name.endswith(WIDE)
    return torch.float32 if wide else dtype


def _add_metadata(writer: Any, architecture: Architecture, model: Model) -> None:
    for key, value in architecture.metadata(model).items():
        kinds = {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        kinds.get(type(value), writer.add_uint32)(f"{architecture.name_of(model)}.{key}", value)


def _add_tokenizer(writer: Any, words: Vocabulary | None, architecture: str, rows: int) -> None:
    if words is None:  # a file of tokens by their numbers alone
        writer.add_tokenizer_model("none")
        writer.add_key_value(f"{architecture}.vocab_size", rows, _uint32())
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for name, number in words.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(False)


def _uint32() -> Any:
    from gguf import GGUFValueType

    return GGUFValueType.UINT32


def _tensors(architecture: Architecture, model: Model, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file in float32, by llama.cpp's names.

    Raises:
        ValueError: llama.cpp has none of that name; it is named.
    """
    own = architecture.name_of(model)
    names, table = _names(own, architecture.metadata(model)["block_count"]), weight_map(model.config)
    yield from architecture.further(model)
    for rule in table.rules:
        given = rule.to_theirs({own: state[own] for own in rule.ours})
        for name, tensor in architecture.join(given).items():
            if name in table.tied:
                continue
            for theirs, piece in _stacked(written_names(model.settings.model_type, name), tensor):
                if not piece.is_meta:
                    piece = piece.cpu()
                for known, changed in architecture.change(model, theirs, piece.float()):
                    yield _stored_name(names, known, own), changed


def _stored_name(names: Any, known: str, architecture: str) -> str:
    """llama.cpp's own name for what it or ``gguf``'s table calls so."""
    found = known if known.startswith("blk.") else names.get_name(known, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"llama.cpp's {architecture} has no tensor for {known}")
    return found


def _stacked(names: tuple[str, ...], tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The pieces of a tensor that files hold by themselves, those of all experts as one."""
    dim = 1 if "{}" in names[0] else 0
    for name, piece in zip(names, tensor.tensor_split(len(names), dim=dim), strict=True):
        yield name.replace(".{}", ""), piece


def _names(architecture: str, layers: Any) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (number,) = (number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(number, layers)
