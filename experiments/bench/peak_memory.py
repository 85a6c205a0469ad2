"""The peak of memory of a call on a CPU, as the system counts it, in a process that does nothing else."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from experiments.bench.benchmarks import Point

WARM_UP = 64
"""Tokens of the call that comes before a measurement."""

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
RESET = "/proc/self/clear_refs"
"""Where Linux sets the high-water mark of resident memory back."""

PATIENCE = 180.0
"""Seconds after which the process is given up."""


def peak_memory(point: Point) -> int | None:
    """Bytes at the peak of a call, its inputs and weights included; ``None`` where they cannot be measured.

    It is the system's high-water mark of resident memory, so kernels' own memory counts as torch's does, in a process
    whose allocator hands back what is freed.
    """
    if not os.access(RESET, os.W_OK):
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.bench.benchmarks", "torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    with _environment(ALLOCATOR):  # read once, by the server that starts with the first call
        process = context.Process(target=_send_peak, args=(sender, point, torch.get_num_threads()), daemon=True)
        process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(PATIENCE) else None
    except EOFError:  # it was killed, as happens where memory runs out, or the call raised an error
        return None
    finally:
        process.kill()
        process.join()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _send_peak(sender: Connection, point: Point, threads: int) -> None:
    torch.set_num_threads(threads)
    sender.send(_peak_here(point))


def _peak_here(point: Point) -> int:
    clock = nullcontext()
    replace(point, sizes=replace(point.sizes, length=WARM_UP)).work()(clock)  # loads code, starts threads
    gc.collect()
    before = resident("VmRSS")
    work = point.work()
    Path(RESET).write_text("5")
    work(clock)
    return resident("VmHWM") - before


def resident(kind: str) -> int:
    """Bytes of this process, as Linux counts them: ``VmRSS`` now, ``VmHWM`` at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return 1024 * int(line.split()[1])
