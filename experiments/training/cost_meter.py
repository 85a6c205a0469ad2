"""The cost of a run: seconds, joules, and which share of its device's speed it reached."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from experiments.training import processes
from experiments.training.checkpoints import TrainState

POWERCAP = Path("/sys/class/powercap")
PEAK_SIZE = {"cpu": 512, "cuda": 8192}
PEAK_TRIALS = 10


class CostMeter:
    """Time since the last lap, energy and memory of all processes: for the counters of a :class:`TrainState`."""

    def __init__(self, device: torch.device):
        self._device, self._energy = device, EnergyMeter(device)
        self._lap, self._worked = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        return time.perf_counter() - self._lap

    def lap(self) -> tuple[float, float]:
        """The seconds since the last lap, by the clock and of the processor; a new one begins."""
        before, worked = self._lap, self._worked
        self._lap, self._worked = time.perf_counter(), time.process_time()
        return self._lap - before, self._worked - worked

    def add_training(self, state: TrainState) -> None:
        seconds, processor_seconds = self.lap()
        state.train_seconds += seconds
        state.processor_seconds += processor_seconds
        self._add_spent(state)

    def add_evaluation(self, state: TrainState) -> None:
        state.eval_seconds += self.lap()[0]
        self._add_spent(state)

    def _add_spent(self, state: TrainState) -> None:
        joules, memory, gpu_memory = zip(
            *processes.gather((self._energy.joules(), *peak_memory(self._device))), strict=True
        )
        spent = [each for each in joules if each is not None]
        if spent:
            state.joules = (state.joules or 0.0) + sum(spent)
        state.peak_memory_bytes = max(state.peak_memory_bytes, *memory)
        state.peak_gpu_memory_bytes = max(state.peak_gpu_memory_bytes, *gpu_memory)


def peak_memory(device: torch.device) -> tuple[int, int]:
    """The most bytes that this process has held at a time, in the machine's memory and in the device's own."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return held, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


class EnergyMeter:
    """The energy of the machine's processors (RAPL) and of a GPU (NVML, through ``pynvml``), where it can be read.

    Each process counts its GPU, and one of each machine the processors; both for whoever else uses them at the time.
    RAPL's counters begin again after some hundred kilojoules, which a busy processor takes a quarter of an hour for:
    one lap of them is made up for, so read more often than that.
    """

    def __init__(self, device: torch.device, powercap: Path | None = None):
        packages = _packages(powercap or POWERCAP) if processes.is_first_of_machine() else []
        self._counters = [*packages, *_gpu(device)]
        self._last = [read() for read, _ in self._counters]

    def joules(self) -> float | None:
        """Since the last call, or since this meter was made; ``None`` where the machine reports nothing."""
        if not self._counters:
            return None
        now = [read() for read, _ in self._counters]
        spans = zip(self._last, now, self._counters, strict=True)
        spent = [after - before if after >= before else after - before + most for before, after, (_, most) in spans]
        self._last = now
        return sum(spent)


Counter = tuple[Callable[[], float], float]
"""A function that reads joules, and how far it counts before it begins again."""


def _packages(powercap: Path) -> list[Counter]:
    """The processors' counters; parts of a processor (``intel-rapl:0:1``) are counted in the whole."""
    found = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        file = folder / "energy_uj"
        if folder.name.count(":") == 1 and _can_read(file):
            most = float((folder / "max_energy_range_uj").read_text()) / 1e6
            found.append((lambda file=file: float(file.read_text()) / 1e6, most))
    return found


def _can_read(file: Path) -> bool:
    try:
        file.read_text()
    except OSError:  # Mostly for root alone.
        return False
    return True


def _gpu(device: torch.device) -> list[Counter]:
    if device.type != "cuda":
        return []
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # No package, no driver, no counter or no right to it: then there is no such number.
        return []
    return [(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, float("inf"))]


@cache
def measured_peak(device: torch.device, precision: str) -> float:
    """FLOPs per second of a square matrix product: the best of some, with the threads that torch has now."""
    size = PEAK_SIZE[device.type]
    a = torch.ones(size, size, device=device, dtype=getattr(torch, precision))
    best = float("inf")
    for _ in range(PEAK_TRIALS):
        _synchronise(device)
        started = time.perf_counter()
        torch.mm(a, a)
        _synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def utilisation(flops: float, seconds: float, peak: float) -> float | None:
    """Model FLOPs per second over the peak's; FLOPs that recomputing repeats are not the model's."""
    return flops / seconds / peak if seconds and peak else None


def price(seconds: float, per_hour: float) -> dict[str, Any]:
    """For the record: nothing where nothing is charged."""
    return {"price": seconds / 3600 * per_hour} if per_hour else {}
