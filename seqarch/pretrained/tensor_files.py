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
from collections.abc import Iterable, Iterator, Sequence
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

RUN, MOST_SPANS = 32 << 20, 1000
"""Bytes and tensors that are read at a time where they stand one after another; the system takes 1024 at most."""

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

    def read_into(self, outs: Sequence[memoryview], start: int) -> int:
        """How many bytes from ``start`` on are in these, one after another, now: fewer than they hold only where the
        file ends.
        """
        done, left = 0, [out for out in outs if len(out)]
        while left and (count := os.preadv(self.descriptor, left, start + done)):
            done += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            left[:1] = [out[count:] for out in left[:1]]
        return done


@dataclass(frozen=True)
class Span:
    """Bytes of a tensor in a file, and the memory where they are to stand."""

    tensor: StoredTensor
    start: int
    out: memoryview


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
        if (span := self.span(out, first)) is not None:
            read_run([span])
            return
        start, flat, size = self._place(first), out.view(-1), self.dtype.itemsize
        block = torch.empty(min(len(flat), BLOCK // size), dtype=self.dtype, device="cpu")
        for done in range(0, len(flat), max(len(block), 1)):
            part = block[: len(flat) - done]
            read_run([Span(self, start + done * size, _bytes_of(part))])
            flat[done : done + len(part)].copy_(part)

    def span(self, out: Tensor, first: int = 0) -> Span | None:
        """The bytes that :meth:`read_into` puts there as they are; ``None`` where it converts them."""
        if out.dtype != self.dtype or out.device.type != "cpu":
            return None
        return Span(self, self._place(first), _bytes_of(out))

    def _place(self, first: int) -> int:
        return self.start + first * math.prod(self.shape[1:]) * self.dtype.itemsize

    def as_rows(self) -> StoredTensor:
        """Of several dimensions: its last one by all others, ``[rows, columns]``."""
        return replace(self, shape=(math.prod(self.shape[:-1]), self.shape[-1]))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def runs(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Spans that stand one after another in a file, so many together that a call reads them."""
    run: list[Span] = []
    length = 0
    for span in sorted(spans, key=lambda span: (str(span.tensor.file), span.start)):
        follows = run and (span.tensor.file, span.start) == (run[-1].tensor.file, run[-1].start + len(run[-1].out))
        if run and not (follows and length + len(span.out) <= RUN and len(run) < MOST_SPANS):
            yield run
            run, length = [], 0
        run.append(span)
        length += len(span.out)
    if run:
        yield run


def read_run(run: Sequence[Span]) -> None:
    """Read spans that stand one after another.

    Raises:
        CheckpointError: the file cannot be read, or ends before they do.
    """
    first, end = run[0], run[-1].start + len(run[-1].out)
    try:
        read = first.start + first.tensor.opened.read_into([span.out for span in run], first.start)
    except OSError as error:
        raise CheckpointError(f"cannot read {first.tensor.file}: {error}") from error
    if read < end:
        broken = next(span.tensor for span in run if span.start + len(span.out) > read)
        raise CheckpointError(f"{broken.file} is damaged: it ends in the middle of {broken.name}")


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
