"""The removal of leftovers of processes that were killed and, on request, of more.

Only what the runner wrote is ever removed, by the names that it gives (``experiments/util/owned.py``), and only where a
folder is proven to be a run's or a sweep's; other files in it are left, and named.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from experiments.runs.folder import ASIDE, RunFolder
from experiments.runs.recorded import RecordedRun, find_runs
from experiments.sweeps import status
from experiments.sweeps.status import SweepStatus
from experiments.util import owned
from experiments.util.errors import RunnerError, writing
from experiments.util.files import OLD_SECONDS
from experiments.util.owned import FILE_OF_CHECKPOINT, IN_CHECKPOINT
from experiments.util.process_identity import is_of_the_dead

IN_CHECKPOINTS = re.compile(rf"\.?step-\d+(\.tmp|\.gone)*/({FILE_OF_CHECKPOINT})?")
"""The paths in the folder ``checkpoints``."""
IN_RUN = re.compile(
    r"(config|run|progress|claim|tokenizer)\.json|(metrics|lm_eval)\.jsonl|train\.log|code(-of-plugin-\w+)?\.diff|data_files\.txt"
    r"|bad/(step-\d+\.npz)?"
    rf"|(bad/)?{ASIDE.pattern}|checkpoints/({IN_CHECKPOINTS.pattern})?|(wandb|tensorboard)/.*"
)
"""The paths in the folder of a run (``experiments/runs/folder.py``), with those of trackers."""


@dataclass(frozen=True)
class Leftover:
    """A file or folder that can go.

    Attributes:
        why: in a few words.
        run: the folder of the run that it is part of; ``None`` where it belongs to none.
        ours: of a folder, the paths in it that the runner writes; ``None`` for a file.
        status: the run's, which must still be the same when it goes; ``None`` where that plays no part.
    """

    path: Path
    why: str
    run: RunFolder | None = None
    ours: re.Pattern[str] | None = None
    status: str | None = None

    @property
    def size(self) -> int:
        """Bytes of what can go."""
        if self.ours is None:
            return self.path.lstat().st_size
        found = (path for path in owned.contents(self.path) if self.ours.fullmatch(path) and not path.endswith("/"))
        return sum((self.path / path).lstat().st_size for path in found)


def leftovers(root: Path, checkpoints: bool = False, failed: bool = False) -> list[Leftover]:
    """Everything below a folder that can go; nothing of a run that is in training.

    Args:
        checkpoints: those of finished runs, too.
        failed: the folders of failed runs, too.

    Raises:
        RunnerError: there is no such folder.
    """
    found = list(_abandoned_sweeps(root))
    runs = [run for run in find_runs(root) if _is_run(run)]
    for run in runs:
        if not run.folder.lock.is_held():
            found += _of_run(run, checkpoints, failed)
    above = {parent for run in runs for parent in run.path.parents if parent.is_relative_to(root)}
    found += _of_reports({root, *above})
    return found


def remove(found: Iterable[Leftover]) -> Iterator[tuple[Leftover, str | None]]:
    """Delete them; each with the reason why it stayed, ``None`` where it is gone.

    The lock of a run is held meanwhile, so that nobody begins to train what is being deleted.
    """
    for leftover in found:
        try:
            with leftover.run.lock if leftover.run else nullcontext():
                _remove(leftover)
            yield leftover, None
        except RunnerError as error:
            yield leftover, str(error)


def _remove(leftover: Leftover) -> None:
    """Take it away, whole or not at all.

    Raises:
        RunnerError: it holds what the runner did not write, or cannot be removed, or is no leftover any more.
    """
    if leftover.run and leftover.status and (status := leftover.run.status()) != leftover.status:
        raise RunnerError(f"the run is {status} by now")  # The lock is held: that is its last status.
    if leftover.ours is None:
        with writing(leftover.path):
            leftover.path.unlink(missing_ok=True)
        return
    if others := owned.strangers(leftover.path, leftover.ours):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise RunnerError(
            f"it holds {', '.join(others[:3])}{more}, which the runner did not write; nothing was removed"
        )
    owned.remove(leftover.path, leftover.ours)


def _abandoned_sweeps(root: Path) -> Iterator[Leftover]:
    for marker in root.glob(f"{status.SWEEPS}/*/{owned.MARKER}"):
        if SweepStatus(marker.parent).is_abandoned():
            yield Leftover(marker.parent, "of a sweep that was killed", ours=status.FILES)
    for folder in root.glob(f"{status.SWEEPS}/*"):
        # A job that began after its sweep was over: Hydra makes a folder for it, and nothing comes into it.
        if (
            status.NAME.fullmatch(folder.name)
            and _is_empty(folder)
            and time.time() - folder.stat().st_mtime > OLD_SECONDS
        ):
            yield Leftover(folder, "an empty folder of a sweep", ours=status.FILES)


def _is_run(run: RecordedRun) -> bool:
    """Whether a folder is what the runner made for a run: other programs keep a ``config.json``, too."""
    try:
        return run.folder.config().may_name(run.name)
    except RunnerError:
        return False


def _of_run(run: RecordedRun, checkpoints: bool, failed: bool) -> Iterator[Leftover]:
    folder = run.folder
    if failed and run.status == "failed":
        yield Leftover(folder.path, "a failed run", folder, IN_RUN, "failed")
        return
    for path in folder.half_written():
        yield Leftover(path, "half written", folder)
    for path in owned.half_checkpoints(folder.checkpoints):
        yield Leftover(path, "half a checkpoint", folder, IN_CHECKPOINT)
    if folder.progress_file.exists():
        yield Leftover(folder.progress_file, "of a process that was killed", folder)
    if folder.lock.path.exists():
        yield Leftover(folder.lock.path, "of a process that was killed", folder)
    if checkpoints and run.status == "finished" and folder.checkpoints.is_dir() and not _is_empty(folder.checkpoints):
        yield Leftover(folder.checkpoints, "checkpoints of a finished run", folder, IN_CHECKPOINTS, "finished")


def _of_reports(folders: Iterable[Path]) -> Iterator[Leftover]:
    """Files written aside for a search, a report or a study, by processes here that are surely gone."""
    for folder in sorted(folders):
        for path in (path for place in ("", "report/", "results/*/*/") for path in folder.glob(f"{place}.*.tmp")):
            if is_of_the_dead(path):
                yield Leftover(path, "half written")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
