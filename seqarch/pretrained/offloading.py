"""Models of which some experts are in memory, and all in the folder's files: ``experts_in_memory`` of loading.

An expert is read from the files where it stands, by the rule of the family that made the whole model's tensors, and
into memory of the model's own. Files are read and not mapped: of a mapped file that is cut off, or lies on a disk that
fails, the process is killed, and nobody can tell how much was read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from seqarch.checkpoints.errors import CheckpointError
from seqarch.interop.weights import Rule
from seqarch.layers.channel.expert_cache import ExpertUse, Policy, policy_maker
from seqarch.layers.channel.moe import MixtureOfExperts
from seqarch.layers.channel.offloaded import OffloadedExperts
from seqarch.layers.modules.quantized import QuantizedMatrices
from seqarch.models import LanguageModel
from seqarch.ops.dispatch.checks import show
from seqarch.pretrained.filling import Filling, Form, is_by_entry
from seqarch.pretrained.sources import Source, files_of


@dataclass(frozen=True)
class Offload:
    """How the experts of a model are kept.

    Attributes:
        places: experts of each layer in memory.
        make_policy: makes each layer's policy.
    """

    places: int
    make_policy: Callable[[], Policy]


def offload_of(
    experts_in_memory: int | None, policy: str | Callable[[], Policy], device: torch.device
) -> Offload | None:
    """What the arguments of loading ask for.

    Raises:
        ValueError: no number of experts, no policy, or another device than a CPU.
    """
    make_policy = policy_maker(policy)
    if experts_in_memory is None:
        return None
    if type(experts_in_memory) is not int or experts_in_memory < 1:
        raise ValueError(f"experts_in_memory is {show(experts_in_memory)}, expected at least 1, or None for all")
    if device.type != "cpu":
        raise ValueError(f"experts_in_memory={experts_in_memory} is for a CPU, got device={str(device)!r}")
    return Offload(experts_in_memory, make_policy)


class ExpertStore:
    """The experts of a model that was read with ``experts_in_memory``: how they were used, and how they are read.

    Attributes:
        layers: the experts of each mixture, by its name, in the order of the layers.
        keep_pages: whether the system may keep what was read of the files in its own memory, as it does while it has
            some to spare. ``False`` has it forget them at once, so that each read is from the disk.
    """

    def __init__(self, layers: Mapping[str, OffloadedExperts], files: Iterable[Path]):
        self.layers, self._files = dict(layers), tuple(files)
        self._readers: list[_FileReader] = [each.reader for each in layers.values()]  # type: ignore[misc]

    @property
    def keep_pages(self) -> bool:
        return all(reader.keep_pages for reader in self._readers)

    @keep_pages.setter
    def keep_pages(self, keep: bool) -> None:
        for reader in self._readers:
            reader.keep_pages = keep
        for file in self._files if not keep else ():
            drop_pages(file)

    @property
    def use(self) -> ExpertUse:
        """Counts of all layers since the model was read, or since :meth:`reset_use`."""
        return reduce(add, (each.cache.use for each in self.layers.values()))

    def reset_use(self) -> None:
        for each in self.layers.values():
            each.cache.use = ExpertUse()

    @property
    def memory_bytes(self) -> int:
        """Of the experts in memory."""
        return sum(each.cache.places * each.expert_bytes for each in self.layers.values())

    @property
    def total_bytes(self) -> int:
        """Of all experts, if they were in memory."""
        return sum(len(each.form["w_in"]) * each.expert_bytes for each in self.layers.values())


def drop_pages(file: Path) -> None:
    """Have the system forget what it keeps of a file in memory; where it offers that, as Linux does.

    Raises:
        OSError: the file cannot be opened.
    """
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class _FileReader:
    """The experts of one layer, in files that must stay as they are."""

    def __init__(self, form: dict[str, Tensor], parts: list[tuple[Rule, dict[str, Source]]], filling: Filling):
        self.form, self._parts, self._filling, self.keep_pages = form, parts, filling, True
        files = {file for _, sources in parts for source in sources.values() for file in files_of(source)}
        self._known = {file: _identity(file) for file in files}

    def read(self, expert: int, into: Mapping[str, Tensor]) -> int:
        """Fill an expert's matrices.

        Raises:
            CheckpointError: a file is gone, or another one than when the model was read.
        """
        for file, known in self._known.items():
            if _identity(file) != known:
                raise CheckpointError(f"{file} has changed since the model was read: its experts are no longer there")
        count = sum(self._filling.entry(rule, sources, expert, into) for rule, sources in self._parts)
        if not self.keep_pages:
            for file in self._known:
                drop_pages(file)
        return count


def _identity(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read the experts in {file}: {error.strerror}") from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def offload_experts(
    model: LanguageModel,
    rules: Iterable[Rule],
    sources: Mapping[str, Source],
    filling: Filling,
    offload: Offload | None,
) -> list[Rule]:
    """Give the mixtures of a model that lies on no device yet their experts from files; the rules of all other tensors.

    Raises:
        CheckpointError: it has none, they are quantised, or they do not stand in the files expert by expert.
    """
    if offload is None:
        return list(rules)
    mixtures = {name: each for name, each in model.named_modules() if isinstance(each, MixtureOfExperts)}
    if not mixtures:
        raise CheckpointError(f"{filling.folder} has no mixture of experts: leave experts_in_memory out")
    worker, layers, left = ThreadPoolExecutor(1, "experts-ahead"), {}, list(rules)
    first_of = {id(module): first for module, first in model.stack.shared}
    for name, mixture in mixtures.items():
        if id(mixture) in first_of:
            continue
        reader, left = _reader(name, mixture, left, sources, filling)
        places = min(offload.places, mixture.config.num_experts)
        layers[name] = OffloadedExperts(reader, places, offload.make_policy(), worker)
        mixture.offload(layers[name])
    for mixture in mixtures.values():  # layers that share their experts have one cache of them
        if isinstance(first := first_of.get(id(mixture)), MixtureOfExperts) and first.offloaded is not None:
            mixture.offload(first.offloaded)
    found = list(layers.values())
    for each, following in pairwise(found):
        each.precede(following)
    model.requires_grad_(False)
    model.expert_store = ExpertStore(layers, {file for each in sources.values() for file in files_of(each)})
    return left


def _reader(
    name: str, mixture: MixtureOfExperts, rules: list[Rule], sources: Mapping[str, Source], filling: Filling
) -> tuple[_FileReader, list[Rule]]:
    """The reader of a mixture's experts, and the rules that it does not take."""
    if isinstance(mixture.w_in, QuantizedMatrices):
        raise CheckpointError(f"{filling.folder}: {name} is quantised, expected plain experts for experts_in_memory")
    matrices = {each: f"{name}.{each}" for each in mixture.projections if getattr(mixture, each) is not None}
    own = [rule for rule in rules if set(rule.ours) & set(matrices.values())]
    parts = []
    for rule in own:
        theirs = {each: sources[each] for each in rule.theirs}
        made: dict[str, Tensor | Form] = {each: filling.form[each] for each in rule.ours}
        if not set(rule.ours) <= set(matrices.values()) or not is_by_entry(rule, list(theirs.values()), made):
            raise CheckpointError(f"{filling.folder}: {' + '.join(rule.theirs)} cannot be read expert by expert")
        filling.check(rule, list(theirs.values()))
        renamed = tuple(each.rpartition(".")[2] for each in rule.ours)
        parts.append((Rule(rule.theirs, renamed, rule.steps), theirs))
    forms = {short: filling.form[full] for short, full in matrices.items()}
    form = {short: torch.empty(each.shape, dtype=each.dtype, device="meta") for short, each in forms.items()}
    return _FileReader(form, parts, filling), [rule for rule in rules if rule not in own]
