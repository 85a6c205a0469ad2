"""A launcher's workers: processes that run the jobs of a sweep, and end when the sweep is gone."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

from experiments.sweeps.status import SweepStatus
from experiments.util.errors import RunnerError
from experiments.util.interrupts import INTERRUPTED
from experiments.util.process_identity import is_alive, process_identity

WATCH_SECONDS = 0.5
LEAVE_SECONDS = 3.0
"""The time that a worker whose sweep is gone stays with its run, which writes its checkpoint without it, too."""

SWEEP = "SEQARCH_SWEEP"
"""The environment variable with the path of a sweep's status, for its workers."""

at_work = threading.Lock()
"""Held by this process while it runs a job."""


def join_sweep() -> SweepStatus:
    """The status of the sweep that this worker works for; from here on the worker ends with the sweep.

    Raises:
        RunnerError: there is no such sweep, or none any more.
    """
    status = SweepStatus(os.environ.get(SWEEP, ""))
    owner = status.owner()
    if owner is None:
        where = f"there is none in {status.path}" if SWEEP in os.environ else f"the variable {SWEEP} is not set"
        raise RunnerError(f"a job looks for the status of its sweep, and {where}: the sweep is over, or never began")
    begin(owner)
    return status


def begin(owner: Mapping[str, Any]) -> None:
    """Prepare a worker, before it waits for its first job."""
    # Ctrl-C in a terminal reaches it too, and would tear it down while it waits for its run to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _leave_with(tuple((key, owner.get(key)) for key in process_identity(os.getpid())))


@functools.cache
def _leave_with(owner: tuple[tuple[str, Any], ...]) -> None:
    """From here on this process ends within seconds when the process that started the sweep is gone.

    A launcher's worker does not notice: it would wait for more work, for minutes.
    """

    def watch() -> None:
        while is_alive(dict(owner)):
            time.sleep(WATCH_SECONDS)
        at_work.acquire(timeout=LEAVE_SECONDS)
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def watch_from_the_start() -> None:
    """Have joblib's workers watch this process from their first moment on, not from their first job on."""
    from joblib.parallel import BACKENDS, register_parallel_backend  # Here, so that nothing else waits for it.

    class Workers(BACKENDS["loky"]):
        def configure(self, *arguments: Any, **options: Any) -> int:
            own = {"initializer": begin, "initargs": (process_identity(os.getpid()),)}
            return super().configure(*arguments, **options, **own)

    register_parallel_backend("loky", Workers)
