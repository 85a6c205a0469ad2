"""Measuring: rounds in which contestants take turns, within a budget of time; peak memory; this machine's ceilings."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch._dynamo  # which the first call of a compiled operator would import: seconds that are not the call's

from experiments.bench.contest import Cost, Runner
from experiments.util.errors import RunnerError, writing
from experiments.util.files import read_json
from seqarch.ops.native import onednn

ROUNDS = 20
WARM_UP = 64
"""Tokens of the call that comes before a measurement of memory."""

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
RESET = "/proc/self/clear_refs"
"""Where Linux sets the high-water mark of resident memory back."""

Point = tuple[str, str, str, int, str]
"""Contest, contestant, way, length and the name of the dtype."""


PATIENCE = 180.0
"""Seconds after which a process that measures memory is given up."""


class Failure(Exception):
    """A contestant whose call raised an error, which is the cause."""

    def __init__(self, name: str, error: Exception):
        super().__init__(name)
        self.name = name
        self.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _tried(name: str, run: Runner) -> float:
    try:
        return run()
    except Exception as error:  # of whatever kind: the others go on
        raise Failure(name, error) from error


def alternate(runners: Mapping[str, Runner], budget: float, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each runner. They take turns, round after round, so that a machine that drifts treats all alike.

    Two calls warm up, or one if that takes ten budgets. By the faster each is given as many of the rounds as fit into
    ``budget`` seconds; where none does, it is what was measured.

    Raises:
        Failure: a call raised an error.
    """
    first = {name: _tried(name, run) for name, run in runners.items()}
    warm = {
        name: min(first[name], _tried(name, run)) if first[name] < 10 * budget else first[name]
        for name, run in runners.items()
    }
    share = {name: min(rounds, int(budget / max(seconds, 1e-9))) for name, seconds in warm.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for index in range(max(share.values(), default=0)):
        for name, run in runners.items():
            if index < share[name]:
                times[name].append(_tried(name, run))
    return {name: found or [warm[name]] for name, found in times.items()}


def expected(known: Mapping[int, float], length: int) -> float:
    """Seconds, or bytes, that a length will take by the growth between the two longest before it; 0 if none is known.

    In proportion at least, and where only one is known; by the cube at most.
    """
    lengths = sorted(known)[-2:]
    if not lengths:
        return 0.0
    power = 1.0
    for short, long in pairwise(lengths):
        power = min(max(1.0, math.log(known[long] / known[short], long / short)), 3.0)
    return known[lengths[-1]] * (length / lengths[-1]) ** power


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster, the median of the ratios of the rounds that both ran."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=False))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at best, as measured with its own libraries.

    Attributes:
        flops: a second, by the dtype's name: a product of square matrices of 2048 by the faster of torch's libraries.
        bandwidth: bytes a second, read and written, in a copy of 256 MiB.
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


COPIED = 2**28
"""Bytes of a copy: far more than a cache holds."""


def ceilings(size: int = 2048, copied: int = COPIED, tries: int = 5) -> Ceilings:
    square = torch.randn(size, size)
    products = {str(dtype)[6:]: square.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = {name: _best(lambda m=matrix: m @ m, tries) for name, matrix in products.items()}
    if onednn.unavailable() is None:
        best["float32"] = min(best["float32"], _best(lambda: onednn.product(square, square), tries))
    copy = _best(copying(copied), tries)
    return Ceilings({name: 2 * size**3 / seconds for name, seconds in best.items()}, 2 * copied / copy)


def copying(copied: int = COPIED) -> Callable[[], object]:
    """A call that reads so many bytes and writes as many."""
    source = torch.ones(copied // 4)
    return partial(torch.empty_like(source).copy_, source)


def _best(work: Callable[[], object], tries: int) -> float:
    times = []
    for _ in range(tries + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def peak_memory(point: Point) -> int | None:
    """Bytes at the peak of a call, its inputs and weights included; ``None`` where they cannot be measured.

    It is the system's high-water mark of resident memory, so kernels' own memory counts as torch's does, in a process
    that does nothing else and whose allocator hands back what is freed.
    """
    if not os.access(RESET, os.W_OK):
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.bench.contests", "torch._dynamo"])
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    os.environ.update(ALLOCATOR)  # read once, by the server that starts with the first call
    receiver, sender = context.Pipe(duplex=False)
    try:
        process = context.Process(target=_send_peak, args=(sender, point, torch.get_num_threads()), daemon=True)
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    sender.close()
    try:
        return receiver.recv() if receiver.poll(PATIENCE) else None
    except EOFError:  # it was killed, as happens where memory runs out, or the call raised an error
        return None
    finally:
        process.kill()
        process.join()


def _send_peak(sender: Connection, point: Point, threads: int) -> None:
    sender.send(_peak_here(point, threads))


def _peak_here(point: Point, threads: int) -> int:
    from experiments.bench.contests import CONTESTS

    name, contestant, way, length, dtype = point
    contest, kind = CONTESTS[name], getattr(torch, dtype)
    torch.set_num_threads(threads)
    contest.runner(contestant, way, contest.inputs(WARM_UP, kind))()  # loads code, starts threads
    gc.collect()
    before = _resident("VmRSS")
    run = contest.runner(contestant, way, contest.inputs(length, kind))
    Path(RESET).write_text("5")
    run()
    return _resident("VmHWM") - before


def _resident(kind: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return 1024 * int(line.split()[1])


def prepare(folder: Path, names: Iterable[str]) -> None:
    """Make the folder of records, before the work; those of these names are to be replaced.

    Raises:
        RunnerError: the folder cannot be made, or a file of such a name is none that a bench wrote.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        there = [path for ending in ("json", "csv", "png") if (path := folder / f"{name}.{ending}").exists()]
        if there and not {"software", "code"} <= (read_json(folder / f"{name}.json") or {}).keys():
            raise RunnerError(f"{there[0]} is no record of a bench and would be written over; give another --folder")
