"""The device: how long work takes on it, how much memory, what it reaches at best, and what it is."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch

from experiments.bench.measure import Ceilings

FLUSHED = 2**28
"""Bytes written between calls, several times what caches hold."""


class Cuda:
    """The CUDA device that torch takes by default, by its own events and allocator."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        self._room = torch.empty(FLUSHED, dtype=torch.int8, device=self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call, from an empty cache."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._room.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self, work: Callable[[], object]) -> int:
        """Bytes at the call's peak, inputs and all else that is held included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._room.nbytes

    def free(self) -> None:
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """What the numbers are of."""
        found = torch.cuda.get_device_properties(self.device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        except (OSError, subprocess.SubprocessError):
            told = []
        return {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "driver": told[0] if told else "unknown",
        }


def ceilings(device: Any, size: int = 8192, copied: int = 2**31, tries: int = 10) -> Ceilings:
    """A product of square matrices of random numbers in each dtype, and a copy, reads and writes counted."""
    flops = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        square = torch.randn(size, size, device=device.device).to(dtype)
        flops[str(dtype)[6:]] = 2 * size**3 / _best(device, lambda m=square: m @ m, tries)
    source = torch.ones(copied // 4, device=device.device)
    target = torch.empty_like(source)
    return Ceilings(flops, 2 * source.nbytes / _best(device, lambda: target.copy_(source), tries))


def _best(device: Any, work: Callable[[], object], tries: int) -> float:
    return min([device.seconds(work) for _ in range(tries + 1)][1:])
