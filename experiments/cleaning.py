"""What can go from a folder of runs: leftovers of processes that were killed and, on request, more."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from experiments.board import Board
from experiments.catalogue import Entry, find
from experiments.errors import RunnerError, writing
from experiments.records import RunFolder

OLD_SECONDS = 3600.0
"""A file that a process writes aside and renames is a leftover once it is this old."""


@dataclass(frozen=True)
class Leftover:
    """Something that can go.

    Attributes:
        why: in a few words.
        run: the folder of the run that it is part of; ``None`` where it belongs to none.
    """

    path: Path
    why: str
    run: RunFolder | None = None

    @property
    def size(self) -> int:
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.lstat().st_size for file in files if not file.is_dir())


def leftovers(root: Path, checkpoints: bool = False, failed: bool = False) -> list[Leftover]:
    """What can go below a folder; nothing of a run that is in training.

    Args:
        checkpoints: those of finished runs, too.
        failed: the folders of failed runs, too.

    Raises:
        RunnerError: there is no such folder.
    """
    found = list(_abandoned_boards(root))
    for entry in find(root):
        if not entry.folder.claim.is_held():
            found += _of_run(entry, checkpoints, failed)
    return found


def remove(found: Iterable[Leftover]) -> Iterator[tuple[Leftover, str | None]]:
    """Delete them; each with the reason why it stayed, ``None`` where it is gone.

    The claim of a run is held meanwhile, so that nobody begins to train what is being deleted.
    """
    for leftover in found:
        try:
            with leftover.run.claim if leftover.run else nullcontext(), writing(leftover.path):
                shutil.rmtree(leftover.path) if leftover.path.is_dir() else leftover.path.unlink(missing_ok=True)
            yield leftover, None
        except RunnerError as error:
            yield leftover, str(error)


def _abandoned_boards(root: Path) -> Iterator[Leftover]:
    for owner in root.glob(".sweeps/*/owner.json"):
        if not (owner.parent / ".submitit").exists() and Board(owner.parent).is_abandoned():
            yield Leftover(owner.parent, "of a sweep that was killed")


def _of_run(entry: Entry, checkpoints: bool, failed: bool) -> Iterator[Leftover]:
    folder = entry.folder
    if failed and entry.status == "failed":
        yield Leftover(folder.path, "a failed run", folder)
        return
    now = time.time()
    for path in (*folder.path.glob(".*.tmp"), *folder.path.glob(".claim.*.dead")):
        if now - path.lstat().st_mtime > OLD_SECONDS:
            yield Leftover(path, "half written", folder)
    if folder.progress_file.exists():
        yield Leftover(folder.progress_file, "of a process that was killed", folder)
    if folder.claim.path.exists():
        yield Leftover(folder.claim.path, "of a process that was killed", folder)
    stored = folder.path / "checkpoints"
    if checkpoints and entry.status == "finished" and stored.is_dir() and any(stored.iterdir()):
        yield Leftover(stored, "checkpoints of a finished run", folder)
