"""Checkpoints: a folder each, written aside and renamed, and believed only if every file's checksum is right.

``checkpoints/step-000100/`` holds the tensors as ``torch.distributed.checkpoint`` writes them, which any number of
processes can load, the random streams of each process, and ``manifest.json`` with the counters and, of every other
file, size and SHA-256. The folder has to be one that all processes see.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from experiments import processes
from experiments.errors import RunnerError, writing
from experiments.files import read_json, write_json

Content = dict[str, dict[str, Tensor]]
"""What training goes on from: the tensors, sharded or not, of the model, the optimizer and the rest."""

MANIFEST = "manifest.json"


@dataclass
class TrainState:
    """Counters of a run.

    Attributes:
        step: optimizer steps done.
        validation: the validation metric at the last look.
        best, best_step: the best so far, and the step it was seen at.
        stale: looks at the validation split since then.
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
    bad_steps: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    processor_seconds: float = 0.0
    joules: float | None = None
    peak_memory_bytes: int = 0
    peak_gpu_memory_bytes: int = 0


class Damaged(RunnerError):
    """A checkpoint that is not what was written."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        keep: how many of the latest stay; of each of these, the best so far stays too.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def newest_first(self, last: float = math.inf) -> list[Path]:
        """The checkpoints of steps up to ``last``; what else lies in the folder is none."""
        names = ((path, path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))
        steps = {int(digits): path for path, digits in names if digits.isdecimal()}
        return [steps[step] for step in sorted(steps, reverse=True) if step <= last]

    def save(self, content: Content, state: TrainState) -> None:
        """Write the checkpoint of ``state.step``, then remove those that are not to stay.

        Raises:
            StorageError: the disk is full, or cannot be written for another reason.
        """
        path = self.path(state.step)
        aside = path.with_name(f".{path.name}.tmp")
        with writing(path):
            if processes.is_main():
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            processes.barrier()
            _distributed(lambda: save(content, storage_writer=FileSystemWriter(aside), no_dist=_alone()))
            buffer = io.BytesIO()  # Of a full disk, a file says more than torch does.
            torch.save(random_streams(), buffer)
            _streams_file(aside).write_bytes(buffer.getvalue())
            processes.barrier()
        manifest = {"state": asdict(state), "processes": processes.count(), "torch": torch.__version__}
        manifest["files"] = _digests(aside, sorted(file.name for file in aside.iterdir()))
        if processes.is_main():
            write_json(aside / MANIFEST, {**manifest, "sha256": _digest_of(manifest)})
            with writing(path):
                _remove(path)  # Where it is there, it was found damaged.
                os.replace(aside, path)
                _sync(self.folder)
                self._prune()
        processes.barrier()

    def resume(self, content: Content, last: float = math.inf) -> TrainState | None:
        """Load the latest checkpoint that is intact into ``content``; ``None`` where there is no checkpoint.

        Args:
            last: none of a later step.

        Raises:
            RunnerError: there are checkpoints, and all are damaged.
        """
        found = self.newest_first(last)
        for path in found:
            try:
                return self.load(path, content)
            except Damaged as error:
                if processes.is_main():
                    print(f"{error}; trying the one before it", file=sys.stderr, flush=True)
        if found:
            raise RunnerError(
                f"every checkpoint in {self.folder} is damaged; delete that folder to start from the beginning"
            )
        return None

    def load(self, path: Path, content: Content) -> TrainState:
        """Load a checkpoint's tensors into ``content``, and with the optimizer's the random streams.

        Raises:
            Damaged: a file of it is missing or not what was written.
            RunnerError: it is of another model, or of another version of the runner.
        """
        manifest = verified(path)
        try:
            state = TrainState(**manifest["state"])
        except TypeError as error:
            raise RunnerError(f"cannot load checkpoint {path}: another version of the runner wrote it") from error
        try:
            _distributed(lambda: load(content, storage_reader=FileSystemReader(path), no_dist=_alone()))
        except (RuntimeError, LookupError, ValueError) as error:
            raise RunnerError(f"cannot load checkpoint {path}: {_first_line(error)}") from error
        streams = _streams_file(path)
        if "optimizer" in content and streams.exists():  # There are none for a process that was not there.
            set_random_streams(torch.load(streams, weights_only=True))
        return state

    def _prune(self) -> None:
        """Remove what is neither among the latest nor the best that one of these knows; and what was left half done."""
        states = [manifest["state"] for path in self.newest_first() if (manifest := _manifest(path))]
        latest = states[: self.keep]
        kept = {self.path(step) for state in latest for step in (state["step"], state["best_step"]) if step is not None}
        for path in self.newest_first():
            if path not in kept:
                _remove(path)
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path)


def verified(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as it was written. All processes share the reading.

    Raises:
        Damaged: naming the first file that is not.
    """
    manifest = _manifest(path)
    if manifest is None:
        raise Damaged(f"checkpoint {path} is damaged: {MANIFEST} is missing or not what was written")
    there = {file.name for file in path.iterdir()}
    found = _digests(path, sorted(name for name in manifest["files"] if name in there))
    for name, written in manifest["files"].items():
        if name not in found:
            raise Damaged(f"checkpoint {path} is damaged: {name} is missing")
        if found[name] != written:
            sizes = f"{found[name]['bytes']} bytes of {written['bytes']}"
            raise Damaged(f"checkpoint {path} is damaged: {name} is not what was written ({sizes})")
    return manifest


def random_streams() -> dict[str, Any]:
    """Where the random generators of this process stand."""
    name, keys, *rest = np.random.get_state()
    streams = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    return {**streams, "numpy": [name, np.asarray(keys).tolist(), *rest], "python": random.getstate()}


def set_random_streams(streams: dict[str, Any]) -> None:
    torch.set_rng_state(streams["torch"])
    if len(streams["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(streams["cuda"])
    np.random.set_state(tuple(streams["numpy"]))
    random.setstate(streams["python"])


def _streams_file(path: Path) -> Path:
    return path / f"random-{processes.rank()}.pt"


def _manifest(path: Path) -> dict[str, Any] | None:
    """What the manifest says; ``None`` where it is not what was written."""
    try:
        manifest = read_json(path / MANIFEST) or {}
    except RunnerError:
        return None
    return manifest if manifest.pop("sha256", None) == _digest_of(manifest) else None


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files by name, and what was just written safely on the disk; each process reads some."""
    own = {name: _digest(folder / name) for name in names[processes.rank() :: processes.count()]}
    return {name: entry for part in processes.gather(own) for name, entry in part.items()}


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def _distributed(action: Callable[[], Any]) -> None:
    """Do what ``torch.distributed.checkpoint`` does, and raise the first process's own error if it fails.

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


def _alone() -> bool:
    return processes.count() == 1


def _remove(path: Path) -> None:
    """Take a folder away in one move, so that no half of it is ever met under its name."""
    if path.exists():
        aside = path.with_name(f".{path.name}.gone")
        os.replace(path, aside)
        shutil.rmtree(aside)


def _sync(folder: Path) -> None:
    """Make sure that a rename in a folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}, {str(error).partition(chr(10))[0]}"
