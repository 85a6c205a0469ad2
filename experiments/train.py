"""Trains one run: ``python -m experiments.train runs/mqar/attention-seed0-...``, or ``torchrun -m`` the same.

The loop is ``experiments/training/loop.py``. SIGTERM makes it write a checkpoint first. Exit codes: 0 finished,
1 failed, 75 preempted (start it again, and it resumes), 130 interrupted.
"""

from __future__ import annotations

from experiments.util.interrupts import INTERRUPTS
from experiments.util.temporary import name_temporary_folder

if __name__ == "__main__":  # Before torch is imported, which takes seconds.
    INTERRUPTS.obey()
    name_temporary_folder()

import argparse
import sys
from pathlib import Path

from experiments.runs.folder import RunFolder
from experiments.runs.other_code import refusal
from experiments.training import processes
from experiments.training.loop import Run
from experiments.training.progress import Heartbeat
from experiments.training.run_record import EXIT_CODES, follow, record_run
from experiments.util.errors import RunnerError
from experiments.util.paths import add_working_directory
from seqarch.ops.native.huge_pages import keep_freed_memory


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m experiments.train", description="Train the run of a folder made by experiments.run."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int, help="stop when the process with this number is gone")
    parser.add_argument(
        "--other-code",
        choices=("refuse", "keep"),
        default="refuse",
        help="what is done with checkpoints of plug-ins with other sources than now (default: refuse)",
    )
    arguments = parser.parse_args()
    add_working_directory()
    INTERRUPTS.obey()
    try:
        return attempt(RunFolder(arguments.folder), arguments.parent, arguments.other_code == "keep")
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CODES["preempted" if INTERRUPTS.requested else "failed"]
    finally:
        INTERRUPTS.ignore()


def attempt(folder: RunFolder, parent: int | None, keep_other_code: bool = False) -> int:
    """Train as the only process at work in a folder, or beside the one that is; returns the exit code.

    Raises:
        RunnerError: the run cannot be trained here, or was begun with other sources of its plug-ins.
    """
    config = folder.config()
    folder.check_links()
    if not keep_other_code and (reason := refusal(folder, config)):
        raise RunnerError(f"{folder.path} was trained with other code: {reason}")
    if not processes.is_main():
        return follow(lambda: Run(config, folder, INTERRUPTS))
    folder.lock.acquire(hurry=lambda: INTERRUPTS.requested)
    with Heartbeat(folder, parent):
        if folder.status() == "finished":  # By another sweep, after this one had looked.
            return EXIT_CODES["finished"]
        return record_run(folder, config, lambda: Run(config, folder, INTERRUPTS))


if __name__ == "__main__":
    keep_freed_memory()
    processes.end(main())
