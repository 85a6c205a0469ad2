"""What a machine does beside what is measured, and how fast its memory is read: both belong to a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

STATISTICS = Path("/proc/stat")
"""Processor time by what it was spent on, in hundredths of a second since the start (Linux, proc(5))."""

READ_BYTES = 2**28
"""Of the memory that is read: far more than caches hold."""


class Others:
    """The share of the machine's processor time that went to other processes since this was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """From 0 to 1, what a hypervisor takes included; ``None`` where the system does not count it."""
        if self._start is None or (now := self._now()) is None:
            return None
        total, busy, own = (end - start for start, end in zip(self._start, now, strict=True))
        return min(max((busy - own) / total, 0.0), 1.0) if total > 0 else 0.0

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds of all processors, those in which they worked, and those of this process."""
        try:
            fields = STATISTICS.read_text(encoding="utf-8").splitlines()[0].split()[1:9]
        except OSError:
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are in user
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
        own = os.times()
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], own.user + own.system


class MemoryRates:
    """How many bytes per second the calls of a library move between memory and processor, by call."""

    def __init__(self, size: int = READ_BYTES) -> None:
        rows = 2**12
        self._matrix = torch.ones(rows, size // 4 // rows)
        self._vector = torch.ones(self._matrix.shape[1])
        self._copy = torch.zeros_like(self._matrix)

    def measure(self) -> dict[str, float]:
        """The better of two calls each. A copy moves every byte twice; the others read it once."""
        size = self._matrix.nbytes
        return {
            "copy": 2 * size / _seconds(lambda: self._copy.copy_(self._matrix)),
            "sum": size / _seconds(lambda: self._matrix.sum()),
            "matrix times vector": size / _seconds(lambda: self._matrix @ self._vector),
        }


def _seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
