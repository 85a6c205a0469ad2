"""Folders that the runner makes for itself, and the one place in which it removes folders.

A folder of its own says so in a file, :data:`MARKER`, with the folder's own name, what it is for and the process that
made it. Whatever is removed is named by a pattern of paths, those that the runner itself writes; everything else stays,
and no link is ever followed. So a folder of somebody else's cannot be emptied, however its path came here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.util.errors import RunnerError, StorageError, writing
from experiments.util.files import read_json, write_json
from experiments.util.process_identity import process_identity

MARKER = "owner.json"
FILE_OF_CHECKPOINT = r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|(random|carried)-\d+\.pt|\.?manifest\.json(\..+\.tmp)?"
IN_CHECKPOINT = re.compile(FILE_OF_CHECKPOINT)
"""The files of a checkpoint."""
ATTEMPTS = 10
"""Another sweep that ends may take an empty folder away while this one makes a folder in it."""

HALF_CHECKPOINT = re.compile(r"\.step-\d+\.(tmp|gone)")
"""The name of a checkpoint while it is written, or removed."""


def make(path: Path, purpose: str) -> list[Path]:
    """Make a folder of one's own, and its marker; the folders that had to be made for it, the outermost first.

    One that this very process has made before serves again.

    Raises:
        StorageError: something is there already, or the folder cannot be made.
    """
    own = {"purpose": purpose, "name": path.name, **process_identity(os.getpid())}
    if maker(path, purpose) == own:
        return [path]
    made: list[Path] = []
    with writing(path):
        for attempt in range(ATTEMPTS):
            try:
                made += [each for each in _missing(path.parent) if _made(each)]
                path.mkdir()
                break
            except FileNotFoundError:
                if attempt == ATTEMPTS - 1:
                    raise
    made.append(path)
    try:
        write_json(path / MARKER, own)
    except RunnerError:
        remove_empty(made)
        raise
    return made


def settle(path: Path, purpose: str, before: Callable[[Path], bool]) -> None:
    """Make a folder of one's own that later processes write into, too, or go back to it; nothing in it is removed.

    Args:
        before: whether a folder without a marker is one's own all the same, by the files in it.

    Raises:
        StorageError: it holds what is somebody else's, is a link, or cannot be made.
    """
    if maker(path, purpose) is not None:
        return
    if path.is_symlink():
        raise StorageError(f"{path} is a link, and nothing is written through one; move it away")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        there = sorted(each.name for each in path.iterdir())
    if there and not before(path):
        raise StorageError(f"{path} holds {there[0]} and is no {purpose}, which is to be written there; move it away")
    write_json(path / MARKER, {"purpose": purpose, "name": path.name, **process_identity(os.getpid())})


def mentions(path: Path, words: str) -> bool:
    """Whether a file of text is there and has some words in it."""
    try:
        return words in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def maker(path: Path, purpose: str) -> dict[str, Any] | None:
    """The process that made a folder for this, by its marker; ``None`` where that says something else, or is a link."""
    if path.is_symlink() or (path / MARKER).is_symlink():
        return None
    try:
        marker = read_json(path / MARKER) or {}
    except RunnerError:
        return None
    return marker if (marker.get("purpose"), marker.get("name")) == (purpose, path.name) else None


def contents(folder: Path) -> Iterator[str]:
    """The paths of everything in a folder, below it, innermost first; folders end with ``/``, links are not followed.

    Raises:
        StorageError: it is a link or no folder, or cannot be read.
    """
    for below, name, _ in _walk(folder):
        yield below + name


def strangers(folder: Path, ours: re.Pattern[str]) -> list[str]:
    """The paths in a folder that ``ours`` does not match.

    Raises:
        StorageError: it is a link or no folder, or cannot be read.
    """
    return sorted(path for path in contents(folder) if not ours.fullmatch(path))


def remove(folder: Path, ours: re.Pattern[str]) -> list[str]:
    """Remove what ``ours`` matches in a folder, and the folder if nothing else is left; returns what stayed.

    Raises:
        StorageError: it is a link or no folder, or something cannot be removed.
    """
    stayed = []
    with writing(folder):
        for below, name, descriptor in _walk(folder):
            if not ours.fullmatch(below + name):
                stayed.append(below + name)
            elif not name.endswith("/"):
                os.unlink(name, dir_fd=descriptor)
            elif not any(path.startswith(below + name) for path in stayed):
                os.rmdir(name.rstrip("/"), dir_fd=descriptor)
        if not stayed:
            folder.rmdir()
    return sorted(stayed)


def remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders that are empty, the last first; others and links stay."""
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:  # It is not empty, or it is gone already.
            continue


def half_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that are half written or half removed. Where nobody trains, nobody is at them."""
    return sorted(path for path in folder.glob(".step-*") if HALF_CHECKPOINT.fullmatch(path.name))


def remove_half_checkpoints(folder: Path) -> None:
    """Remove what a process that was killed left of checkpoints. Whoever trains the run may."""
    for path in half_checkpoints(folder):
        remove_half_checkpoint(path)


def remove_half_checkpoint(path: Path) -> list[str]:
    """Remove what the runner wrote in a half checkpoint, and that if nothing else is in it; returns what stayed.

    A link of its name goes and is not followed; one that is gone is no error.

    Raises:
        StorageError: something cannot be removed.
        ValueError: it is not named as a half checkpoint is.
    """
    if not HALF_CHECKPOINT.fullmatch(path.name):
        raise ValueError(f"{path} is not named as a half checkpoint is, {HALF_CHECKPOINT.pattern}")
    if path.is_dir() and not path.is_symlink():
        return remove(path, IN_CHECKPOINT)
    with writing(path):
        path.unlink(missing_ok=True)
    return []


def _walk(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Everything in a folder, as the path to it, its name, and a descriptor of its folder; the marker comes last."""
    if folder.is_symlink() or not folder.is_dir():
        raise StorageError(f"cannot look into {folder}: expected a folder, and it is a link or something else")

    def refuse(error: OSError) -> None:
        raise error

    with writing(folder):
        for place, folders, files, descriptor in os.fwalk(folder, topdown=False, onerror=refuse):
            below = Path(place).relative_to(folder).as_posix()
            below = "" if below == "." else f"{below}/"
            links = [name for name in folders if os.path.islink(os.path.join(place, name))]
            for name in sorted([*files, *links], key=lambda name: name == MARKER):
                yield below, name, descriptor
            for name in folders:
                if name not in links:
                    yield below, f"{name}/", descriptor


def _missing(path: Path) -> list[Path]:
    """The folders that are not there on the way to a path and with it, the outermost first."""
    return [each for each in reversed([path, *path.parents]) if not each.exists()]


def _made(path: Path) -> bool:
    """Make a folder; whether it was this process that did."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True
