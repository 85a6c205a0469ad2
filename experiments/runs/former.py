"""Runs that were trained again: moved aside, where nothing but a person looks for them."""

from __future__ import annotations

import itertools
from pathlib import Path

from experiments.runs.folder import RunFolder
from experiments.runs.lock import RunLock
from experiments.util.errors import writing
from experiments.util.files import make_folder

FORMER = ".former"
"""The folder of such runs, beside those that took their places."""


def move_aside(folder: RunFolder) -> Path:
    """Move the whole folder of a run away, in one step; the new place. For who holds its lock, which is released.

    Raises:
        StorageError: it cannot be moved, and is where it was.
    """
    place = folder.path.parent / FORMER
    make_folder(place)
    for number in itertools.count(1):
        target = place / f"{folder.path.name}.{number}"
        with writing(target):
            try:
                target.mkdir()  # Nobody else takes this name, and a folder can be moved onto an empty one.
            except FileExistsError:
                continue
            try:
                folder.path.rename(target)
            except OSError:
                target.rmdir()
                raise
        RunLock(target / folder.lock.path.name).release()
        return target
    raise AssertionError("there is a number that is free")
