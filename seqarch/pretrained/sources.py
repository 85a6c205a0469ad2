"""Tensors as a table of weights wants them, from the pieces of them that files hold."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from seqarch.checkpoints.errors import CheckpointError
from seqarch.interop.file_names import Pieces, is_unused, pieces_there, written_names
from seqarch.interop.weights import WeightMap
from seqarch.pretrained.tensor_files import StoredTensor


class Source(Protocol):
    """A tensor that can be read, whole or in part along its first dimension."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read_into(self, out: Tensor, first: int = 0) -> None:
        """Fill a contiguous tensor, of any dtype and on any device, with the entries from ``first`` on."""
        ...

    def as_rows(self) -> Source:
        """Of several dimensions: the same numbers as ``[rows, columns]``, whose columns are the last dimension."""
        ...


class Joined:
    """Tensors one after another along the first dimension."""

    def __init__(self, parts: Sequence[Source]):
        self.parts = parts
        self.dtype = parts[0].dtype
        self._starts = [0, *accumulate(part.shape[0] for part in parts)]
        self.shape = (self._starts[-1], *parts[0].shape[1:])

    def read_into(self, out: Tensor, first: int = 0) -> None:
        filled, i = 0, bisect_right(self._starts, first) - 1
        while filled < len(out):
            within = first + filled - self._starts[i]
            count = min(self.parts[i].shape[0] - within, len(out) - filled)
            if count:
                self.parts[i].read_into(out[filled : filled + count], within)
            filled, i = filled + count, i + 1

    def as_rows(self) -> Joined:
        return Joined([part.as_rows() for part in self.parts])


class Stacked:
    """Tensors of one shape along a new first dimension."""

    def __init__(self, entries: Sequence[Source]):
        self.entries = entries
        self.dtype = entries[0].dtype
        self.shape = (len(entries), *entries[0].shape)

    def read_into(self, out: Tensor, first: int = 0) -> None:
        for entry, own in zip(self.entries[first : first + len(out)], out, strict=True):
            entry.read_into(own)

    def as_rows(self) -> Joined:
        return Joined([entry.as_rows() for entry in self.entries])


def files_of(source: Source) -> Iterator[Path]:
    """The files that a tensor is from, in the order of its pieces."""
    if isinstance(source, Joined | Stacked):
        for each in source.parts if isinstance(source, Joined) else source.entries:
            yield from files_of(each)
    elif isinstance(source, StoredTensor):
        yield source.file


def sources(family: str, table: WeightMap, stored: Mapping[str, StoredTensor], folder: Path) -> dict[str, Source]:
    """Each tensor of a family's state dict that the table makes something of, by its name there.

    Raises:
        CheckpointError: tensors are missing or left over (all are listed), pieces do not fit together, or those that
            follow from the configuration are others.
    """
    names, tied = [name for rule in table.rules for name in rule.theirs], table.tied
    stored = dict(stored)
    prefix = names[0].partition(".")[0] + "."
    if pieces_there(family, names[0], stored) is None and names[0].removeprefix(prefix) in stored:
        # the file of a model without a head
        stored = {name if name == "lm_head.weight" else prefix + name: tensor for name, tensor in stored.items()}
    for name in table.computed.keys() & stored.keys():
        _check_computed(table, name, stored.pop(name))
    for name, original in table.more.items():
        if name in stored:
            _check_copy(stored.pop(name), stored.get(original))
    found = {name: pieces_there(family, name, stored) for name in names}
    for copy, original in tied.items() - table.more.items():
        found[copy] = found[copy] or found[original]
    used = {piece for pieces in found.values() if pieces for entry in pieces.entries for piece in entry}
    missing = [piece for name, pieces in found.items() if pieces is None for piece in written_names(family, name)]
    check_names(missing, [name for name in stored if name not in used and not is_unused(family, name)], folder)
    return {name: _source(pieces, stored, name) for name, pieces in found.items() if pieces is not None}


def _read(stored: StoredTensor) -> Tensor:
    tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
    stored.read_into(tensor)
    return tensor


def _check_copy(copy: StoredTensor, original: StoredTensor | None) -> None:
    """Raise where what repeats another tensor of theirs is another; where that is missing, its absence is named."""
    if original is not None and not torch.equal(_read(copy), _read(original)):
        raise CheckpointError(f"{copy.file}: {copy.name} and {original.name} are one tensor, but differ here")


def _check_computed(table: WeightMap, name: str, stored: StoredTensor) -> None:
    try:
        table.check_computed(name, _read(stored))
    except ValueError as error:
        raise CheckpointError(f"{stored.file}: {error}") from error


def check_names(missing: Iterable[str], left_over: Iterable[str], folder: Path) -> None:
    """Raise if there are such tensors; all of them are listed."""
    sides = {"missing": missing, "left over": left_over}
    lines = [f"  {kind}: {name}" for kind, names in sides.items() for name in sorted(names)]
    if lines:
        listed = [*lines[:40], *([f"  and {len(lines) - 40} more"] if len(lines) > 40 else [])]
        raise CheckpointError("\n".join([f"the tensors of {folder} are not those of its config.json:", *listed]))


def _source(pieces: Pieces, stored: Mapping[str, StoredTensor], name: str) -> Source:
    entries = [[stored[piece] for piece in entry] for entry in pieces.entries]
    for entry in entries:
        for piece, first in zip(entry, entries[0], strict=True):
            if (piece.shape, piece.dtype) != (first.shape, first.dtype):
                raise CheckpointError(f"{piece.file}: {_show(piece)}, expected the same as {_show(first)}")
    first = entries[0]
    if any(
        (each.shape[1:], each.dtype) != (first[0].shape[1:], first[0].dtype) or not each.shape for each in first[1:]
    ):
        shapes = ", ".join(_show(each) for each in first)
        raise CheckpointError(f"{first[0].file}: the pieces of {name} do not fit together: {shapes}")
    joined = [entry[0] if len(entry) == 1 else Joined(entry) for entry in entries]
    return Stacked(joined) if pieces.stacked else joined[0]


def _show(tensor: StoredTensor) -> str:
    return f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}"
