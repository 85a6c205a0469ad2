"""Signs of life of a training process: how far it is, and that it still works on its run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable

from torch import Tensor

from experiments.runs.folder import RunFolder
from experiments.runs.lock import HEARTBEAT_SECONDS, LockLost
from experiments.util.errors import StorageError
from experiments.util.files import write_atomic
from experiments.util.process_identity import is_alive, process_identity

REFRESH_SECONDS = 0.5


class ProgressFile:
    """``progress.json``, refreshed twice a second: for whoever watches the folder."""

    def __init__(self, folder: RunFolder, steps: int, first_step: int, clock: Callable[[], float] = time.monotonic):
        self._path, self._steps, self._first, self._clock = folder.progress_file, steps, first_step, clock
        self._started, self._written = clock(), -REFRESH_SECONDS

    def update(self, step: int, loss: float | Tensor, tokens_per_second: float) -> None:
        """Where training is; a loss that is still on the device is waited for only where it is written."""
        now = self._clock()
        if now - self._written < REFRESH_SECONDS and step < self._steps:
            return
        self._written = now
        seconds_left = (now - self._started) / max(step - self._first, 1) * (self._steps - step)
        values = {"step": step, "steps": self._steps, "loss": float(loss), "tokens_per_second": tokens_per_second}
        write_atomic(self._path, json.dumps({**values, "seconds_left": seconds_left}), durable=False)


class Heartbeat:
    """Renews a run's lock from a thread, and stops the process when it lost the lock or its parent is gone.

    Args:
        parent: number of the process that started this one, itself or through torchrun; ``None`` to outlive it.
    """

    def __init__(self, folder: RunFolder, parent: int | None):
        self._folder, self._parent = folder, None if parent is None else process_identity(parent)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._folder.leave()

    def _beat(self) -> None:
        renewed = time.monotonic()
        while not self._over.wait(0.5):
            if self._parent is not None and not is_alive(self._parent):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if time.monotonic() - renewed >= HEARTBEAT_SECONDS:
                renewed = time.monotonic()
                try:
                    self._folder.lock.renew()
                except LockLost as error:  # Two must not write here; the other one continues.
                    print(f"stopped: {error}", flush=True)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                except StorageError as error:  # The next write of the run itself will fail and say so.
                    print(f"the lock could not be renewed: {error}", flush=True)
