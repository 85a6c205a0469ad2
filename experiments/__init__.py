"""The experiment runner on seqarch: tasks, training, records and reports, and the command ``seqarch``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.tasks import Task
    from experiments.trackers import Tracker

__all__ = ["register_task", "register_tracker"]


def register_task(name: str, task: type[Task]) -> None:
    """Make a task of one's own a choice of ``task.name``; checks and errors are those of
    ``experiments/config/registration.py``.
    """
    from experiments.config import registration  # NumPy, for which a process that begins need not wait.

    registration.register_task(name, task)


def register_tracker(name: str, tracker: type[Tracker]) -> None:
    """Make a tracker of one's own a choice of ``tracker.name``, as :func:`register_task` does with a task."""
    from experiments.config import registration

    registration.register_tracker(name, tracker)
