"""The tensors of a folder's safetensors files, one file or several with an index, read where they are wanted.

The ``safetensors`` library checks each file's header. The bytes are read here, straight into the memory where they are
to stay: mapped files, the library's way, would count as memory until the whole file is closed.
"""

from __future__ import annotations

import json
import math
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seqarch.checkpoints.errors import CheckpointError
from seqarch.checkpoints.manifest import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK = 16 << 20
"""Bytes that are read at a time where they are converted on their way."""

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
"""By their names in files. Formats of 8 bits and less are those of quantised models, whose numbers need scales."""


class _OpenFile:
    """A file that is open while any of its tensors is wanted; several threads may read it at a time."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read_into(self, out: memoryview, start: int) -> int:
        """How many bytes from ``start`` on there are in ``out`` now: fewer than it holds only where the file ends."""
        done = 0
        while done < len(out) and (count := os.preadv(self.descriptor, [out[done:]], start + done)):
            done += count
        return done


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: in the file.
        start: of its bytes, in the file.
    """

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    opened: _OpenFile = field(repr=False, compare=False)

    def read_into(self, out: Tensor, first: int = 0) -> None:
        """Fill a contiguous tensor, of any dtype and on any device, with the entries from ``first`` on.

        Its first dimension says how many of them; a tensor that has no dimension is one entry.
        """
        start = first * math.prod(self.shape[1:]) * self.dtype.itemsize
        if out.dtype == self.dtype and out.device.type == "cpu":
            self._read_bytes(out, start)
            return
        flat, size = out.view(-1), self.dtype.itemsize
        block = torch.empty(min(len(flat), BLOCK // size), dtype=self.dtype, device="cpu")
        for done in range(0, len(flat), max(len(block), 1)):
            part = block[: len(flat) - done]
            self._read_bytes(part, start + done * size)
            flat[done : done + len(part)].copy_(part)

    def as_rows(self) -> StoredTensor:
        """Of several dimensions: its last one by all others, ``[rows, columns]``."""
        return replace(self, shape=(math.prod(self.shape[:-1]), self.shape[-1]))

    def _read_bytes(self, out: Tensor, skipped: int) -> None:
        if not out.numel():
            return
        wanted = out.view(-1).view(torch.uint8).numpy().data
        try:
            if self.opened.read_into(wanted, self.start + skipped) < len(wanted):
                raise CheckpointError(f"{self.file} is damaged: it ends in the middle of {self.name}")
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}: {error}") from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's files, by their names.

    Raises:
        CheckpointError: a file is missing or damaged, its index names one elsewhere, or there are no such files.
    """
    if (folder / SINGLE).is_file():
        return {tensor.name: tensor for tensor in _tensors_of(folder / SINGLE)}
    index = read_json(folder / INDEX)
    if index is None:
        raise CheckpointError(_without_tensors(folder))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map, an object of the file of each tensor by its name")
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        _check_name(folder, name)
        for tensor in _tensors_of(folder / name):
            if tensor.name in found:
                raise CheckpointError(
                    f"{tensor.name} is in two files of {folder}: {found[tensor.name].file.name}, {name}"
                )
            found[tensor.name] = tensor
    for name, file in weight_map.items():
        if name not in found or found[name].file.name != file:
            raise CheckpointError(f"{folder / file} has no tensor {name}, which {INDEX} says is there")
    return found


def _check_name(folder: Path, name: str) -> None:
    if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
        raise CheckpointError(f"{folder / INDEX} names {name!r}: expected a .safetensors file of this folder")
    try:
        there = (folder / name).is_file()
    except OSError as error:
        raise CheckpointError(f"{folder / INDEX} names {name!r}, which cannot be a file: {error.strerror}") from error
    if not there:
        raise CheckpointError(f"{folder / name} is missing, of which {INDEX} says that tensors are in it")


def _tensors_of(path: Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(path, "pt"):  # checks that the tensors cover the file, each of the size that it should be
            pass
        opened = _OpenFile(path)
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is of {entry['dtype']}, expected one of {', '.join(DTYPES)}: quantised models are not"
                " read"
            )
        start = 8 + length + entry["data_offsets"][0]
        yield StoredTensor(path, name, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, opened)


def _without_tensors(folder: Path) -> str:
    wanted = f"{folder} has neither {SINGLE} nor {INDEX}"
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if others:
        return (
            f"{wanted}, and {others[0]} is a pickle, which may run anything as it is read and is not read here."
            " Convert it once, if you trust it: load it with transformers, and save_pretrained(OTHER_FOLDER)"
        )
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"{wanted}; it has {', '.join(others[:3])}"
    return wanted
