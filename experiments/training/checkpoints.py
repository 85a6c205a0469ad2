"""Checkpoints: a folder each, written aside and renamed, and believed only if every file's checksum is right.

``checkpoints/step-000100/`` holds the tensors as ``torch.distributed.checkpoint`` writes them, which any number of
processes can load, the random streams of each process and the states that it carries on, and ``manifest.json`` with the
counters and, of every other file, size and SHA-256. The folder has to be one that all processes see. A checksum shows
damage and no forgery, so nothing in these files is run as they are read.
"""

from __future__ import annotations

import io
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from experiments.training import processes
from experiments.util.errors import MALFORMED, RunnerError, StorageError, writing
from experiments.util.files import make_folder, write_json
from experiments.util.owned import remove_half_checkpoint, remove_half_checkpoints
from seqarch.checkpoints.errors import CheckpointError
from seqarch.checkpoints.manifest import (
    MANIFEST,
    checkpoint_name,
    checkpoints_by_step,
    damage,
    file_digest,
    manifest_digest,
    read_manifest,
    sync,
)
from seqarch.checkpoints.tensor_reader import TensorReader

Content = dict[str, dict[str, Tensor]]
"""The tensors that training resumes from, sharded or not: of the model, the optimizer and the rest."""

KINDS: dict[Any, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
KINDS |= dict.fromkeys(("list[int]", "list[float]", "list[str]"), (list,))
KINDS |= {f"{kind} | None": (*types, type(None)) for kind, types in KINDS.items()}
"""The types that JSON gives for an entry of :class:`TrainState`, by its type there."""


@dataclass
class TrainState:
    """Counters of a run.

    Attributes:
        step: optimizer steps done.
        validation: the validation metric of the last evaluation.
        best, best_step: the best so far, and its step.
        stale: evaluations on the validation split since then.
        evaluations: on the validation split so far. Each left a line of metrics, on the disk before the checkpoint is.
        losses: the validation loss at each evaluation of the stable phase, where the schedule waits for it to settle.
        decay_from: the step from which the rate falls, and ``ending`` what ended the stable phase; ``None`` before.
        stage, stage_began: of a curriculum the number of its stage and the step at which that began, from which
            ``best``, ``stale`` and ``losses`` count; ``stage_endings`` is what ended those before.
        taken: the steps on each source of the data, where there are several.
        recent, recent_losses: of a mixture, the sound steps on each source since the last evaluation, and the sum of
            their losses.
        bad_steps: steps that were skipped, as ``train.bad_step`` says.
        train_seconds, eval_seconds: spent in training steps and on the validation split.
        processor_seconds: of all threads of the main process, in training steps: what a busy machine does not change
            much.
        joules: energy that the machines report for both; ``None`` where they report none.
        peak_memory_bytes, peak_gpu_memory_bytes: of the process that took most.
    """

    step: int = 0
    validation: float | None = None
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    evaluations: int = 0
    losses: list[float] = field(default_factory=list)
    decay_from: int | None = None
    ending: str | None = None
    stage: int = 0
    stage_began: int = 0
    stage_endings: list[str] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    recent: list[int] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    bad_steps: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    processor_seconds: float = 0.0
    joules: float | None = None
    peak_memory_bytes: int = 0
    peak_gpu_memory_bytes: int = 0


NUMPY_KEYS = 624
"""Numbers in the state of NumPy's Mersenne Twister."""


class Damaged(RunnerError):
    """A checkpoint that is not what was written."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        keep_last: how many of the latest stay; of each of these, the best so far stays too.
    """

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last

    def path(self, step: int) -> Path:
        return self.folder / checkpoint_name(step)

    def newest_first(self, last: float = math.inf) -> list[Path]:
        """The checkpoints of steps up to ``last``; what else lies in the folder is none."""
        return [path for step, path in checkpoints_by_step(self.folder).items() if step <= last]

    def save(self, content: Content, state: TrainState, carried: dict[str, Any] | None = None) -> None:
        """Write the checkpoint of ``state.step``, then remove those that are not to stay.

        Args:
            carried: of this process's own, of tensors and numbers, for :meth:`carried`.

        Raises:
            StorageError: the disk is full, or cannot be written for another reason.
        """
        path = self.path(state.step)
        aside = path.with_name(f".{path.name}.tmp")
        with writing(path):
            if processes.is_main():
                if stayed := remove_half_checkpoint(aside):
                    raise StorageError(f"cannot write {aside}: it holds {stayed[0]}, which the runner did not write")
                make_folder(aside)
            processes.barrier()
            _distributed(lambda: save(content, storage_writer=FileSystemWriter(aside), no_dist=_alone()))
            _write(_streams_file(aside), random_streams())
            if carried is not None:
                _write(aside / f"carried-{processes.rank()}.pt", carried)
            processes.barrier()
        manifest = {"state": asdict(state), "processes": processes.count(), "torch": torch.__version__}
        manifest["files"] = _digests(aside, sorted(file.name for file in aside.iterdir()), synced=True)
        if processes.is_main():
            write_json(aside / MANIFEST, {**manifest, "sha256": manifest_digest(manifest)})
            with writing(path):
                _remove(path)  # Where it is there, it was found damaged.
                os.replace(aside, path)
                sync(self.folder)
                self._prune()
        processes.barrier()

    def resume(self, content: Content, last: float = math.inf) -> TrainState | None:
        """Restore the latest checkpoint that is intact into ``content``; ``None`` where there is no checkpoint.

        Args:
            last: none of a later step.

        Raises:
            RunnerError: there are checkpoints, and all are damaged.
        """
        found = self.newest_first(last)
        for path in found:
            try:
                return self.restore(path, content)
            except Damaged as error:
                if processes.is_main():
                    print(f"{error}; trying the one before it", file=sys.stderr, flush=True)
        if found:
            raise RunnerError(
                f"every checkpoint in {self.folder} is damaged; delete that folder to start from the beginning"
            )
        return None

    def load_first(self, paths: Iterable[Path], content: Content) -> tuple[Path, TrainState, list[str]]:
        """Load the tensors of the first checkpoint that is intact; which, and what is wrong with those before it.

        Raises:
            RunnerError: none is.
        """
        problems: list[str] = []
        for path in paths:
            try:
                return path, self.load_tensors(path, content), problems
            except Damaged as error:
                problems.append(str(error))
        raise RunnerError("; ".join([*problems, f"delete {self.folder} to train the run again from the beginning"]))

    def restore(self, path: Path, content: Content) -> TrainState:
        """Load all that training resumes from: the tensors into ``content``, and this process's random streams.

        Raises:
            Damaged, RunnerError: as in :meth:`load_tensors`.
        """
        state = self.load_tensors(path, content)
        streams = _streams_file(path)
        if streams.exists():  # There are none for a process that was not there.
            with _loading(path):
                set_random_streams(torch.load(streams, weights_only=True))
        return state

    def carried(self, step: int, device: torch.device) -> list[dict[str, Any]]:
        """What each process carried on at a step, whose checkpoint was restored.

        Raises:
            RunnerError: it is not there, or cannot be read.
        """
        path = self.path(step)
        files = sorted(path.glob("carried-*.pt"))
        if not files:
            raise RunnerError(f"cannot load checkpoint {path}: it has no states that go on")
        with _loading(path):
            found = [torch.load(file, map_location=device, weights_only=True) for file in files]
        if any(not isinstance(each, dict) or each.keys() != {"first", "count", "leaves"} for each in found):
            raise RunnerError(f"cannot load checkpoint {path}: its states that go on are none")
        return found

    def load_tensors(self, path: Path, content: Content) -> TrainState:
        """Load the tensors of a checkpoint into ``content``, and nothing else of it.

        Raises:
            Damaged: a file of it is missing or not what was written.
            RunnerError: it is of another model, of another version of the runner, or was not written by it at all.
        """
        state = state_of(path, verified(path))
        try:
            reader = TensorReader(path)
        except CheckpointError as error:
            raise RunnerError(str(error)) from error
        with _loading(path):
            _distributed(lambda: load(content, storage_reader=reader, no_dist=_alone()))
        return state

    def states(self) -> dict[Path, TrainState]:
        """The counters of every checkpoint whose manifest is intact, the newest first."""
        found = {}
        for path in self.newest_first():
            with suppress(RunnerError):  # Of another version, which nothing here resumes from.
                if manifest := read_manifest(path):
                    found[path] = state_of(path, manifest)
        return found

    def _prune(self) -> None:
        """Remove what is neither among the latest nor the best that one of these knows; and what was left half done."""
        states = [manifest["state"] for path in self.newest_first() if (manifest := read_manifest(path))]
        steps = [state.get(key) for state in states[: self.keep_last] for key in ("step", "best_step")]
        kept = {self.path(step) for step in steps if type(step) is int}
        for path in self.newest_first():
            if path not in kept:
                _remove(path)
        remove_half_checkpoints(self.folder)


def load_named(key: str, path: Path, digest: str | None, content: Content) -> None:
    """Load the tensors of a checkpoint that a run is made with into ``content``.

    Args:
        key: the option that names it.
        digest: of its manifest, as it was when the run was made.

    Raises:
        Damaged, RunnerError: as in :meth:`Checkpoints.load_tensors`, or it is not the one that was found when the run
            was made.
    """
    manifest = verified(path)
    if manifest_digest(manifest) != digest:
        raise RunnerError(f"{key}: {path} has the hash {manifest_digest(manifest)}, and this run began with {digest}")
    Checkpoints(path.parent, 1).load_tensors(path, content)


def state_of(path: Path, manifest: dict[str, Any]) -> TrainState:
    """The counters in a manifest.

    Raises:
        RunnerError: they are not those of this version of the runner, or of another step.
    """
    try:
        state = TrainState(**manifest["state"])
        wrong = [each.name for each in fields(TrainState) if type(getattr(state, each.name)) not in KINDS[each.type]]
    except TypeError as error:
        raise RunnerError(f"cannot load checkpoint {path}: another version of the runner wrote it") from error
    if wrong:
        raise RunnerError(f"cannot load checkpoint {path}: its {wrong[0]} is {getattr(state, wrong[0])!r}")
    if path.name != checkpoint_name(state.step):
        raise RunnerError(f"cannot load checkpoint {path}: it is of step {state.step}")
    return state


def verified(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as it was written. All processes share the reading.

    Raises:
        Damaged: naming the first file that is not.
    """
    manifest = read_manifest(path)
    there = {file.name for file in path.iterdir()} if path.is_dir() else set()
    found = _digests(path, sorted(name for name in manifest["files"] if name in there)) if manifest else {}
    if problem := damage(manifest, found):
        raise Damaged(f"checkpoint {path} is damaged: {problem}")
    assert manifest is not None
    return manifest


def random_streams() -> dict[str, Any]:
    """The states of this process's random generators."""
    name, keys, *rest = np.random.get_state()
    streams = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    return {**streams, "numpy": [name, np.asarray(keys).tolist(), *rest], "python": random.getstate()}


def set_random_streams(streams: dict[str, Any]) -> None:
    name, keys, place, *_ = streams["numpy"]
    if name != "MT19937" or len(keys) != NUMPY_KEYS or not 0 <= place <= NUMPY_KEYS:
        raise ValueError("it is no state of NumPy's generator")  # Which would read there unchecked.
    torch.set_rng_state(streams["torch"])
    if len(streams["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(streams["cuda"])
    np.random.set_state(tuple(streams["numpy"]))
    random.setstate(streams["python"])


def _streams_file(path: Path) -> Path:
    return path / f"random-{processes.rank()}.pt"


def _write(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # Of a full disk, a file says more than torch does.
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())


def _digests(folder: Path, names: list[str], synced: bool = False) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files by name, with ``synced`` once they are on the disk; each process reads some."""
    own = {name: file_digest(folder / name, synced) for name in names[processes.rank() :: processes.count()]}
    return {name: entry for part in processes.gather(own) for name, entry in part.items()}


def _distributed(action: Callable[[], Any]) -> None:
    """Run a call of ``torch.distributed.checkpoint``, and raise the first process's own error if it fails.

    Of a full disk torch's error says nothing, so it is the system's error behind it that is raised.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            action()
        except CheckpointException as error:
            reason: BaseException | None = next(iter(error.failures.values()))[0]
            chain = [reason]
            while reason := reason.__cause__ or reason.__context__:
                chain.append(reason)
            raise next((e for e in chain if isinstance(e, OSError)), chain[0]) from None


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Turn what torch raises for a file that does not hold what it should into an error that names the checkpoint."""
    try:
        yield
    except MALFORMED as error:
        raise RunnerError(f"cannot load checkpoint {path}: {_first_line(error)}") from error


def _alone() -> bool:
    return processes.count() == 1


def _remove(path: Path) -> None:
    """Take a folder away in one move, so that no half of it is ever met under its name."""
    if path.exists():
        aside = path.with_name(f".{path.name}.gone")
        remove_half_checkpoint(aside)
        os.replace(path, aside)
        remove_half_checkpoint(aside)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}, {str(error).partition(chr(10))[0]}"
