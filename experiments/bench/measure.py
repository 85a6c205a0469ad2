"""Measuring: rounds in which implementations take turns, within a budget of time, at sizes that are expected to end."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from experiments.bench.benchmark import TOKEN, Absent, Benchmark, Cost, Inputs, Work
from experiments.bench.benchmarks import Point
from experiments.bench.devices import Device
from experiments.bench.record import Record, Row
from experiments.bench.sizes import Sizes

ROUNDS = 20
CONTEXT = 8192
"""Tokens before the one that is decoded, at most."""

Runner = Callable[[], float]
"""Does the work once and returns the seconds that it took."""


class Failure(Exception):
    """An implementation whose call raised an error."""

    def __init__(self, name: str, error: Exception):
        super().__init__(name)
        self.name, self.error = name, error

    @property
    def reason(self) -> str:
        if isinstance(self.error, torch.OutOfMemoryError):
            return "out of memory"
        return f"{type(self.error).__name__}: {' '.join(str(self.error).split())[:300]}"


def _tried(name: str, run: Runner) -> float:
    try:
        return run()
    except Exception as error:  # of whatever kind: the others continue
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
    """The factor by which it is faster, the median of the ratios of the rounds that both ran."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=False))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


Plan = Iterable[tuple[Sizes, tuple[str, ...]]]
"""Sizes, and the modes that are timed at them."""


def plan(
    benchmark: Benchmark, device: Device, dtype: str, lengths: Sequence[int], widths: Sequence[int], tokens: int | None
) -> Plan:
    """For each width all lengths, of ``tokens`` together, the shortest first; and one token after many."""
    for width in widths:
        sizes = partial(Sizes, device.setup, width=width, dtype=getattr(torch, dtype), device=device.device)
        for length in sorted(length for length in lengths if length <= benchmark.longest):
            yield sizes(length, batch=1 if tokens is None else max(1, tokens // length)), benchmark.modes
        for batch in device.setup.token_batches if benchmark.token else ():
            yield sizes(min(CONTEXT, max(lengths)), batch=batch), (TOKEN,)


class Measurement:
    """Measures a benchmark: sizes one after the other, implementations in turn; none are begun after ``deadline``."""

    def __init__(self, benchmark: Benchmark, record: Record, device: Device, deadline: float = math.inf):
        self.benchmark, self.record, self.device, self.deadline = benchmark, record, device, deadline
        self.baselines = benchmark.baselines[device.setup.kind]
        self.longest_call = device.longest_call(record.budget_s)
        self.times: dict[tuple[str, str, int], dict[int, float]] = {}
        self.peaks: dict[tuple[str, str, int], dict[int, float]] = {}

    def run(self, plan: Plan) -> Record:
        for sizes, modes in plan:
            if time.monotonic() > self.deadline:
                self.record.out_of_time.append(sizes.length)
                continue
            for mode in modes:
                try:
                    self._measure(mode, sizes)
                except Exception as error:  # of whatever kind, as for implementations
                    self._fail(Failure("the benchmark", error), mode, sizes)
        return self.record

    def _measure(self, mode: str, sizes: Sizes) -> None:
        times, cost = self._timed(mode, sizes)
        self.device.free()  # inputs, models and optimizers are gone before memory is measured
        baseline = next((name for name in self.baselines if name in times or name not in self.record.absent), "")
        for name, seconds in times.items():
            self.record.rows.append(self._row(name, mode, sizes, seconds, cost, times.get(baseline)))

    def _timed(self, mode: str, sizes: Sizes) -> tuple[dict[str, list[float]], Cost]:
        """Seconds of the implementations whose calls raise no error, and what a call costs."""
        torch.manual_seed(0)
        inputs = self.benchmark.inputs(mode, sizes)
        works = dict(self._works(mode, sizes, inputs))
        runners = {name: partial(self.device.seconds, work) for name, work in works.items()}
        cost = self.benchmark.cost(mode, sizes, inputs)
        while True:
            try:
                return alternate(runners, self.record.budget_s), cost
            except Failure as failure:
                del runners[failure.name], works[failure.name]
                self._fail(failure, mode, sizes)

    def _works(self, mode: str, sizes: Sizes, inputs: Inputs) -> Iterator[tuple[str, Work]]:
        """The implementations that can run, and are expected to end in time and to find memory."""
        for name in self.benchmark.shown(sizes.setup, mode):
            key = name, mode, sizes.width
            seconds = expected(self.times.get(key, {}), sizes.length)
            peak = expected(self.peaks.get(key, {}), sizes.length)
            if seconds > self.longest_call or peak > self.device.memory_limit or self._gave_up(name, mode, sizes):
                self._leave_out(name, mode, sizes, seconds, peak)
                continue
            try:
                work = self.benchmark.work(name, mode, sizes.setup, inputs)
                first = self.device.first_call(work)
            except Absent as reason:
                self.record.absent.setdefault(name, str(reason))
            except Exception as error:
                self._fail(Failure(name, error), mode, sizes)
            else:
                if first > self.longest_call:
                    self._leave_out(name, mode, sizes, first, peak)
                else:
                    yield name, work

    def _leave_out(self, name: str, mode: str, sizes: Sizes, seconds: float, peak: float) -> None:
        why = {"expected_s": rounded(seconds), "expected_peak_mb": rounded(peak / 1e6)}
        self.record.left_out.append(_place(name, mode, sizes) | why)

    def _fail(self, failure: Failure, mode: str, sizes: Sizes) -> None:
        """Record an error.

        Raises:
            Exception: this one, where the device cannot be measured any more, or should not.
        """
        if not self.device.survives(failure.error, ours=failure.name not in self.baselines):
            raise failure.error
        self.device.free()
        self.record.failed.append(_place(failure.name, mode, sizes) | {"reason": failure.reason})

    def _gave_up(self, name: str, mode: str, sizes: Sizes) -> bool:
        """Whether shorter ones of as many sequences were left out already, or failed."""
        same = _place(name, mode, sizes).items() - {("length", sizes.length)}
        gone = (*self.record.left_out, *self.record.failed)
        return any(same <= one.items() and one["length"] < sizes.length for one in gone)

    def _row(
        self, name: str, mode: str, sizes: Sizes, seconds: list[float], cost: Cost, baseline: list[float] | None
    ) -> Row:
        low, median, high = quartiles(seconds)
        least, ceiling = self.record.ceilings.seconds(cost, self.record.dtype)
        point = Point(self.record.benchmark, name, mode, sizes)
        peak = self.device.peak(point) if median <= self.longest_call else None
        key = name, mode, sizes.width
        self.times.setdefault(key, {})[sizes.length] = min(seconds)
        if peak is not None:
            self.peaks.setdefault(key, {})[sizes.length] = max(peak, 1)
        return Row(
            **_place(name, mode, sizes),
            rounds=len(seconds),
            median_ms=rounded(1e3 * median),
            quartile1_ms=rounded(1e3 * low),
            quartile3_ms=rounded(1e3 * high),
            tflops=rounded(cost.flops / median / 1e12),
            times_faster=None if baseline is None else rounded(ratio(baseline, seconds)),
            share=rounded(least / median),
            ceiling=ceiling,
            moved_mb=rounded(cost.bytes / 1e6),
            peak_mb=None if peak is None else rounded(peak / 1e6),
        )


def _place(name: str, mode: str, sizes: Sizes) -> dict[str, Any]:
    """The fields that say what a row, or what is missing, is of."""
    return {"implementation": name, "mode": mode, "width": sizes.width, "length": sizes.length, "batch": sizes.batch}
