"""The device that is measured: its clock, its memory, what it reaches at best, and what it is."""

from __future__ import annotations

import math
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._dynamo  # which the first call of a compiled operator would import: seconds that are not the call's
from torch import Tensor

from experiments.bench.benchmark import Cost, Work, timed
from experiments.bench.benchmarks import Point
from experiments.bench.peak_memory import peak_memory
from experiments.bench.sizes import CPU, CUDA, Setup
from experiments.util.environment import hardware
from seqarch.ops.native import onednn

FLUSHED = 2**28
"""Bytes written between calls on a GPU, several times what caches hold."""

MEMORY_SHARE = 0.6
"""Of the machine's memory, what a call may be expected to need."""

LONGEST = 5.0
"""Seconds that a call on a GPU may be expected to take, and no longer."""


@dataclass(frozen=True)
class Ceilings:
    """The best that a device reaches, as measured with its own libraries.

    Attributes:
        flops: per second, by the dtype's name: a product of square matrices by the faster of torch's libraries.
        bandwidth: bytes per second, read and written, in a copy.
    """

    flops: dict[str, float]
    bandwidth: float

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each: on a shared machine a single measurement may be far too low."""
        flops = {name: max(value, other.flops[name]) for name, value in self.flops.items()}
        return Ceilings(flops, max(self.bandwidth, other.bandwidth))

    def seconds(self, cost: Cost, dtype: str) -> tuple[float, str]:
        """The least time for so much work, and the name of the ceiling that sets it."""
        arithmetic, memory = cost.flops / self.flops[dtype], cost.bytes / self.bandwidth
        return max((arithmetic, "arithmetic"), (memory, "bandwidth"))


class Device(ABC):
    """A device that the bench runs on.

    Attributes:
        setup: the sizes of its benchmarks.
        device: as torch names it.
        square, copied, tries: the rows of a matrix and the bytes of a copy, which are far more than a cache holds, of
            its ceilings, and how often each is measured.
        memory_limit: bytes that a call may be expected to need.
    """

    setup: Setup
    device: torch.device
    square: int
    copied: int
    tries: int
    memory_limit: float

    @property
    @abstractmethod
    def name(self) -> str:
        """For people."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The hardware behind the numbers, for a record."""

    @abstractmethod
    def seconds(self, work: Work) -> float:
        """Seconds of one call."""

    @abstractmethod
    def first_call(self, work: Work) -> float:
        """Seconds of the call that comes before all that are timed, where kernels are compiled in it; else 0."""

    @abstractmethod
    def peak(self, point: Point) -> int | None:
        """Bytes at the peak of a call, its inputs and weights included; ``None`` where they cannot be measured."""

    @abstractmethod
    def longest_call(self, budget: float) -> float:
        """Seconds that a call may be expected to take, where each implementation has ``budget`` seconds."""

    @abstractmethod
    def survives(self, error: Exception, ours: bool) -> bool:
        """Whether others can be measured after a call, of ours or of a baseline, that raised this error."""

    @abstractmethod
    def free(self) -> None:
        """Give memory back that nothing uses."""

    def ceilings(self) -> Ceilings:
        square = torch.randn(self.square, self.square, device=self.device)
        best = {}
        for name in self.setup.dtypes:
            products = self.products(square.to(getattr(torch, name)))
            best[name] = min(self._best(product) for product in products)
        copy = self._best(copying(self.copied, self.device))
        flops = {name: 2 * self.square**3 / seconds for name, seconds in best.items()}
        return Ceilings(flops, 2 * self.copied / copy)

    def products(self, square: Tensor) -> list[Callable[[], object]]:
        """A matrix times itself, by each library that there is."""
        return [lambda: square @ square]

    def _best(self, call: Callable[[], object]) -> float:
        return min([self.seconds(timed(call, {})) for _ in range(self.tries + 1)][1:])


def copying(copied: int, device: torch.device) -> Callable[[], object]:
    """A call that reads so many bytes and writes as many."""
    source = torch.ones(copied // 4, device=device)
    return partial(torch.empty_like(source).copy_, source)


class WallClock:
    """Adds up the seconds of its blocks."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


class Cpu(Device):
    """The processor: wall clock, and memory as the system counts it."""

    setup = CPU
    device = torch.device("cpu")
    square, copied, tries = 2048, 2**28, 5

    def __init__(self) -> None:
        self.memory_limit = MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @property
    def name(self) -> str:
        found = self.describe()
        return f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads"

    def describe(self) -> dict[str, Any]:
        """With the load, and without the host's name."""
        found = hardware(self.device) | {"load": os.getloadavg()[0]}
        found.pop("host")
        return found

    def seconds(self, work: Work) -> float:
        clock = WallClock()
        work(clock)
        return clock.seconds

    def first_call(self, work: Work) -> float:
        return 0.0

    def peak(self, point: Point) -> int | None:
        return peak_memory(point)

    def longest_call(self, budget: float) -> float:
        return budget

    def survives(self, error: Exception, ours: bool) -> bool:
        return True

    def free(self) -> None: ...

    def products(self, square: Tensor) -> list[Callable[[], object]]:
        products = super().products(square)
        if square.dtype is torch.float32 and onednn.unavailable() is None:
            products.append(lambda: onednn.product(square, square))
        return products


class EventClock:
    """Adds up the seconds of its blocks by the device's own events."""

    def __init__(self) -> None:
        self._blocks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._blocks.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._blocks[-1][0].record()

    def __exit__(self, *_: object) -> None:
        self._blocks[-1][1].record()

    @property
    def seconds(self) -> float:
        """Of all blocks, once the device is done with them."""
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._blocks) / 1e3


class Cuda(Device):
    """The CUDA device that torch takes by default: its own events, and torch's allocator."""

    setup = CUDA
    device = torch.device("cuda")
    square, copied, tries = 8192, 2**31, 10
    memory_limit = math.inf  # a call that finds no memory raises an error

    def __init__(self) -> None:
        self._cache_filler = torch.empty(FLUSHED, dtype=torch.int8, device=self.device)

    @property
    def name(self) -> str:
        return self.describe()["name"]

    def describe(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(self.device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            drivers = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        except (OSError, subprocess.SubprocessError):
            drivers = []
        return {
            "device": "cuda",
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "driver": drivers[0] if drivers else "unknown",
        }

    def seconds(self, work: Work) -> float:
        """Of one call, from a flushed cache."""
        clock = EventClock()
        self._cache_filler.zero_()
        work(clock)
        return clock.seconds

    def first_call(self, work: Work) -> float:
        """Triton compiles a kernel, and chooses its configuration, when it is first met."""
        return self.seconds(work)

    def peak(self, point: Point) -> int:
        work = point.work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work(nullcontext())
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._cache_filler.nbytes

    def longest_call(self, budget: float) -> float:
        return LONGEST

    def survives(self, error: Exception, ours: bool) -> bool:
        """Memory that runs out, and a baseline's kernel that refuses these sizes, are no reason to stop."""
        return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and not ours)

    def free(self) -> None:
        torch.cuda.empty_cache()


DEVICES: dict[str, type[Cpu] | type[Cuda]] = {"cpu": Cpu, "cuda": Cuda}
