"""Reading and writing small files so that none is ever half there, and what was written outlives a power cut.

A file is on the disk only when it was synced, and is found there only when the folder that names it was synced too.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.util.errors import RunnerError, writing
from experiments.util.process_identity import is_of_the_dead, mark
from seqarch.checkpoints import manifest
from seqarch.checkpoints.errors import CheckpointError
from seqarch.checkpoints.manifest import sync

OLD_SECONDS = 3600.0
"""The age from which a file written aside is a leftover, where nobody can know whether its process runs."""


def write_atomic(path: Path, data: str | bytes, durable: bool = True, mode: int = 0o666) -> None:
    """Write aside, then rename: a reader sees the old file or the new one, whole.

    Args:
        durable: whether both are on the disk on return; otherwise that is left to the system.
        mode: of a new file, less what the umask forbids; one that is replaced keeps its own.
    """
    aside = path.with_name(f".{path.name}.{mark()}.tmp")
    with writing(path):
        try:
            _write(aside, data.encode() if isinstance(data, str) else data, durable, mode, like=path)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        if durable:
            sync(path.parent)


def _write(path: Path, data: bytes, durable: bool, mode: int, like: Path) -> None:
    """Into a new file, never through a link that somebody left under its name."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        if like.is_file() and not like.is_symlink():
            os.fchmod(file.fileno(), like.stat().st_mode & 0o777)
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, value: Mapping[str, Any], durable: bool = True) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n", durable)


def append_line(path: Path, line: str, durable: bool = True) -> None:
    """Add a line to a file, or some that it holds.

    Args:
        durable: whether it is on the disk on return, and so a file that was not there; otherwise that is left to the
            system, or to the next line that is durable.
    """
    with writing(path):
        new = not path.exists()
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if new:
            sync(path.parent)


def make_folder(path: Path) -> None:
    """A folder and those above it; on the disk on return."""
    with writing(path):
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in reversed(missing):
            sync(each.parent)


def half_written(folder: Path, names: re.Pattern[str]) -> Iterator[Path]:
    """The files that processes that are gone wrote aside in a folder, under some names, and did not rename."""
    for path in sorted(path for path in folder.glob(".*") if names.fullmatch(path.name)):
        gone = is_of_the_dead(path)
        if (gone or (gone is None and _age(path) > OLD_SECONDS)) and (path.is_symlink() or path.is_file()):
            yield path


def _age(path: Path) -> float:
    """In seconds; 0 where the file is gone meanwhile."""
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, or ``None`` where there is no such file.

    Raises:
        RunnerError: the file is there and holds something else.
    """
    try:
        return manifest.read_json(path)
    except CheckpointError as error:
        raise RunnerError(str(error)) from error
