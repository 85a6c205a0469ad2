"""The tensors of a model from those of files: read, changed by a table of weights, and put in their place.

A model's memory is taken tensor by tensor, as each is read, by as many threads as torch has. What a rule only moves is
read to its place: tensors that are parts of ours into those parts, ours that are parts of theirs from there, and a
transposed one by tiles that stay in the processor's cache. What else a rule changes is read in blocks along the first
dimension where it leaves that alone, so that little more than the model is in memory at any time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from seqarch.checkpoints.building import main_dtype, wide_parameters
from seqarch.checkpoints.errors import CheckpointError
from seqarch.interop.weights import Rule
from seqarch.models import LanguageModel
from seqarch.ops.native.huge_pages import in_huge_pages
from seqarch.pretrained.placing import Move, moves
from seqarch.pretrained.sources import Source, files_of
from seqarch.pretrained.tensor_files import Span, StoredTensor, read_run, runs

BLOCK = 8 << 20
"""Bytes of a tensor of theirs that a rule is given at a time, where it can be given a part."""


class Form(NamedTuple):
    """What a tensor is to be."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass
class Filling:
    """The tensors of one model.

    Attributes:
        form: of the tensors to be made, by name.
        wide: names of those that stay as wide as files have them.
        device: of what is made.
        folder: where the tensors are from, for errors.
    """

    form: Mapping[str, Form]
    wide: set[str]
    device: torch.device
    folder: Path

    def apply_all(self, rules: Iterable[Rule], sources: Mapping[str, Source]) -> dict[str, Tensor]:
        """Our tensors of all rules, from theirs.

        Raises:
            CheckpointError: one is of another shape than it must be, or damaged.
        """
        # Memory is taken by this thread, which has what earlier models have left; the others write to it first.
        made: dict[str, Tensor] = {}
        spans: list[Span] = []
        left: list[Callable[[], None]] = []
        for rule in rules:
            theirs = [sources[name] for name in rule.theirs]
            made |= (own := self._memory_of(rule, theirs))
            plain = [Move(theirs[0], own[rule.ours[0]])] if _is_plain(rule) else moves(rule, theirs, own)
            if plain is None:
                left.append(partial(self._in_blocks, rule, theirs, own))
            for move in plain or ():
                if (span := move.span()) is not None:
                    spans.append(span)
                else:
                    left.append(move.run)
        waiting = iter([*(partial(read_run, run) for run in runs(spans)), *left])

        def work(_: int) -> None:
            try:
                for each in waiting:
                    each()
            except BaseException:
                deque(waiting, maxlen=0)  # nothing is left to the other threads
                raise

        if (count := torch.get_num_threads()) == 1:
            work(0)
        else:
            with ThreadPoolExecutor(count) as threads:
                list(threads.map(work, range(count)))
        return made

    def _memory_of(self, rule: Rule, theirs: Sequence[Source]) -> dict[str, Tensor]:
        """Room for our tensors of a rule, which nobody has written to."""
        self.check(rule, theirs)
        return {name: in_huge_pages(self._empty(name, theirs)) for name in rule.ours}

    def _in_blocks(self, rule: Rule, theirs: Sequence[Source], made: Mapping[str, Tensor]) -> None:
        size = theirs[0].shape[0] if theirs and theirs[0].shape else 0
        rows = self._rows_at_a_time(rule, theirs, made)
        parts = [_memory(source, rows) for source in theirs]
        for first in range(0, size, rows) if rows else [0]:
            count = min(rows, size - first)
            read = [part[:count] if rows else part for part in parts]
            for source, part in zip(theirs, read, strict=True):
                source.read_into(part, first)
            outs = {name: tensor[first : first + count] if rows else tensor for name, tensor in made.items()}
            self._put(rule, dict(zip(rule.theirs, read, strict=True)), outs)

    def entry(self, rule: Rule, sources: Mapping[str, Source], number: int, outs: Mapping[str, Tensor]) -> int:
        """Fill one entry of each of our tensors from theirs at the same place; the bytes that were read.

        Raises:
            CheckpointError: a file is gone, or damaged.
        """
        theirs, ours = [sources[name] for name in rule.theirs], {name: outs[name][None] for name in rule.ours}
        if _is_plain(rule):
            theirs[0].read_into(ours[rule.ours[0]], number)
        else:
            parts = [_memory(source, 1) for source in theirs]
            for source, part in zip(theirs, parts, strict=True):
                source.read_into(part, number)
            self._put(rule, dict(zip(rule.theirs, parts, strict=True)), ours)
        return sum(_bytes(source) // source.shape[0] for source in theirs)

    def check(self, rule: Rule, theirs: Sequence[Source]) -> None:
        """Raise where theirs are of other kinds or shapes than they must be, as far as that shows before the rule."""
        self._check_kind(rule, theirs)
        if _is_plain(rule):
            self._check_shape(rule, theirs[0])

    def _empty(self, name: str, theirs: Sequence[Source]) -> Tensor:
        form = self.form[name]
        dtype = form.dtype
        if name in self.wide and theirs:
            dtype = torch.promote_types(dtype, theirs[0].dtype)
        return torch.empty(form.shape, dtype=dtype, device=self.device)

    def _check_kind(self, rule: Rule, theirs: Sequence[Source]) -> None:
        """Integers are no parameters: those of other libraries' quantised models are codes."""
        expected = {self.form[name].dtype.is_floating_point for name in rule.ours}
        for name, source in zip(rule.theirs, theirs, strict=True):
            if {source.dtype.is_floating_point} != expected:
                wanted = "floating point" if True in expected else "integers"
                raise CheckpointError(f"{_file(source)}: {name} is of {source.dtype}, expected {wanted}")

    def _check_shape(self, rule: Rule, source: Source) -> None:
        """Before memory is taken for it, which may be out of reach where ``config.json`` is wrong."""
        expected = tuple(self.form[rule.ours[0]].shape)
        if source.shape != expected:
            is_of = f"{rule.theirs[0]} is {list(source.shape)}"
            raise CheckpointError(f"{_file(source)}: {is_of}, expected {list(expected)} by config.json")

    def _put(self, rule: Rule, parts: Mapping[str, Tensor], outs: Mapping[str, Tensor]) -> None:
        try:
            results = rule.to_ours(parts)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {error}") from error
        for name, out in outs.items():
            if results[name].shape != out.shape:
                theirs = " + ".join(f"{each} {list(part.shape)}" for each, part in parts.items())
                raise CheckpointError(
                    f"{self.folder}: {theirs} gives {name} {list(results[name].shape)}, expected {list(out.shape)} by"
                    " config.json"
                )
            out.copy_(results[name])

    def _rows_at_a_time(self, rule: Rule, theirs: Sequence[Source], made: Mapping[str, Tensor]) -> int:
        """How many entries along the first dimension to give the rule at a time; 0 where it needs the whole.

        It needs the whole unless each entry of ours is made of theirs at the same place, which one entry of each shows:
        steps along that dimension check its size, or make something else than one entry.
        """
        whole_bytes = sum(_bytes(source) for source in theirs)
        if whole_bytes <= BLOCK or not is_by_entry(rule, theirs, made):
            return 0
        return max(1, BLOCK * theirs[0].shape[0] // whole_bytes)


def _is_plain(rule: Rule) -> bool:
    """Whether a tensor of ours is one of theirs as it is."""
    return len(rule.theirs) == len(rule.ours) == 1 and not rule.steps


def is_by_entry(rule: Rule, theirs: Sequence[Source], ours: Mapping[str, Tensor | Form]) -> bool:
    """Whether each entry of ours along the first dimension is made of theirs at the same place, of two or more."""
    sizes = {source.shape[0] if source.shape else 0 for source in theirs}
    sizes |= {tensor.shape[0] if tensor.shape else 0 for tensor in ours.values()}
    if len(sizes) != 1 or min(sizes) < 2:
        return False
    one = [torch.empty((1, *source.shape[1:]), dtype=source.dtype, device="meta") for source in theirs]
    try:
        results = rule.to_ours(dict(zip(rule.theirs, one, strict=True)))
    except ValueError:
        return False
    return all(results[name].shape == (1, *tensor.shape[1:]) for name, tensor in ours.items())


def most_numbers(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of most of the numbers in files."""
    return main_dtype((each.dtype, math.prod(each.shape)) for each in stored.values())


def filling(model: LanguageModel, dtype: torch.dtype | None, device: torch.device, folder: Path) -> Filling:
    """How to fill a model, which has the dtype that it is to have: this one, or that of most numbers in its files.

    With no dtype given, the mixers' own parameters stay as wide as they are in the files.
    """
    form = {name: Form(tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    return Filling(form, set() if dtype is not None else wide_parameters(model), device, folder)


def _memory(source: Source, rows: int) -> Tensor:
    """Room for so many entries of a tensor; for all of it, where that is 0."""
    shape = (rows, *source.shape[1:]) if rows else source.shape
    return torch.empty(shape, dtype=source.dtype, device="cpu")


def _bytes(source: Source) -> int:
    return math.prod(source.shape) * source.dtype.itemsize


def _file(source: Source) -> Path:
    """A file that a tensor is from."""
    return next(files_of(source))
