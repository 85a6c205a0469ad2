"""A tracker that can never stop a run."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.trackers.tracker import Tracker

PATIENCE_SECONDS = 60.0
"""The time that a tracker may take to begin, to log some steps, or to end."""


class Guarded(Tracker):
    """Another tracker, whose first failure is reported and ends its use; training continues.

    To hang is a failure too: after :data:`PATIENCE_SECONDS` the processes that the tracker started are killed, as they
    could keep this one from ending.

    Attributes:
        error: the first failure; ``None`` as long as there is none.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]):
        self.name, self.error = name, None
        self._inner: Tracker | None = None
        before, self._started = children(), set()
        self._try(lambda: setattr(self, "_inner", make()))
        self._started = children() - before

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.log_steps({step: values})

    def log_steps(self, values: Mapping[int, Mapping[str, float]]) -> None:
        """As one action, so that a step of training waits for one thread; for none where the tracker keeps nothing."""
        inner = self._inner
        if inner is not None and type(inner).log is not Tracker.log:
            self._try(lambda: inner.log_steps(values))

    def finish(self, status: str, results: Mapping[str, Any]) -> None:
        if inner := self._inner:
            self._try(lambda: inner.finish(status, results))

    def _try(self, action: Callable[[], object]) -> None:
        errors: list[str] = []

        def work() -> None:
            try:
                action()
            except Exception as error:  # Whatever a third party's service does, the run is worth more.
                errors.append(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(PATIENCE_SECONDS)
        if thread.is_alive():
            errors.append(f"no answer within {PATIENCE_SECONDS:g} seconds")
            for pid in self._started & children():
                os.kill(pid, signal.SIGKILL)
        if errors:
            self._inner, self.error = None, errors[0]
            print(f"tracker {self.name} failed and is not used any more: {self.error}", file=sys.stderr, flush=True)


def children(pid: int | str = "self") -> set[int]:
    """The processes that a process started, by default this one; none where the system does not say."""
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # A thread that has ended meanwhile.
            found |= {int(pid) for pid in task.read_text().split()}
    return found
