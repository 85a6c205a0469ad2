"""Reads a checkpoint's tensors without running anything that its files say.

``torch.distributed.checkpoint`` keeps the index of a checkpoint, ``.metadata``, as a pickle, and a pickle can name any
function to be called as it is read. Here it can name nothing but the classes of an index, each of them replaced by one
that holds what it is given and does nothing; the index is then made anew from what was held, checked piece by piece.
An index that lists objects other than tensors is refused, as torch would unpickle those too.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from seqarch.checkpoints.errors import MALFORMED, CheckpointError

INDEX = "torch.distributed.checkpoint.metadata"
ADMITTED = {
    *((INDEX, name) for name in ("Metadata", "StorageMeta", "TensorStorageMetadata", "TensorProperties")),
    *((INDEX, name) for name in ("ChunkStorageMetadata", "MetadataIndex", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}
"""The names that an index may hold, besides torch's dtypes. None of it is called or made: see :class:`Held`."""


class Held:
    """Stands for an object of a pickle: what it was made with and the state it was given, and no behaviour."""

    def __init__(self, *given: Any):
        self.given = given

    def __setstate__(self, state: Any) -> None:
        # Without this method the pickle's own words would set attributes, those of the class among them.
        self.state = state


class TensorReader(FileSystemReader):
    """torch's reader of a checkpoint in a folder, for tensors alone.

    Raises:
        CheckpointError: the index is not one of tensors that lie in this folder; it names the first thing that is not.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        path = folder / ".metadata"
        try:
            with open(path, "rb") as file:
                self._known = _index(_Unpickler(file).load(), load_id=self.load_id)
        except (*MALFORMED, OSError) as error:
            raise CheckpointError(f"cannot read {path}: it is no index of tensors ({error})") from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._known

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Size and dtype of each tensor by its name, ``model.embedding.weight``."""
        entries = self._known.state_dict_metadata.items()
        return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) in ADMITTED:
            return type(name, (Held,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _index(held: Any, load_id: str) -> Metadata:
    """torch's index, from what the pickle held. The planner's part is left out: loading has no use for it."""
    state = _state(held, "Metadata")
    tensors = {_text(name): _tensor(entry) for name, entry in _mapping(state["state_dict_metadata"]).items()}
    places = dict(_place(index, info) for index, info in _mapping(state["storage_data"]).items())
    return Metadata({**tensors}, storage_data=places, storage_meta=StorageMeta(load_id=load_id))


def _tensor(held: Any) -> TensorStorageMetadata:
    state = _state(held, "TensorStorageMetadata")
    dtype = _held(state["properties"], "TensorProperties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected a dtype, got {_shown(dtype)}")
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in state["chunks"]]
    sizes = [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks]
    return TensorStorageMetadata(TensorProperties(dtype), _size(state["size"]), sizes)


def _place(held: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    """Which part of a tensor, and where in a file of the folder it lies."""
    index, place = _state(held, "MetadataIndex"), _state(info, "_StorageInfo")
    name = _text(place["relative_path"])
    if Path(name).name != name:
        raise ValueError(f"{name} is not a file of this folder")
    if place.get("transform_descriptors") is not None:
        raise ValueError(f"{name} is compressed")
    hint = None if index["index"] is None else _number(index["index"])
    part = MetadataIndex(_text(index["fqn"]), _size(index["offset"]), hint)
    return part, _StorageInfo(name, _number(place["offset"]), _number(place["length"]))


def _held(value: Any, name: str) -> Held:
    if not isinstance(value, Held) or type(value).__name__ != name:
        raise ValueError(f"expected {name}, got {_shown(value)}")
    return value


def _state(value: Any, name: str) -> Mapping[str, Any]:
    return _mapping(_held(value, name).state)


def _size(value: Any) -> torch.Size:
    (numbers,) = _held(value, "Size").given
    size = torch.Size([_number(number) for number in numbers])
    if math.prod(size) >= 2**62:
        raise ValueError(f"a tensor of {tuple(size)}")
    return size


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"expected a whole number, 0 or more, got {_shown(value)}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"expected a name, got {_shown(value)}")
    return value


def _mapping(value: Any) -> Mapping[Any, Any]:
    if type(value) is not dict:
        raise ValueError(f"expected a mapping, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return type(value).__name__
