"""The project's targets for a CPU: bounds on two measurements of one run: ``experiments.bench targets``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from experiments.bench.benchmark import AUTO, PASSES, TOKEN, Absent, timed
from experiments.bench.benchmarks import BENCHMARKS, Point
from experiments.bench.devices import Cpu, copying
from experiments.bench.measure import Failure, alternate, ratio
from experiments.bench.record import prepare_folder, provenance, text_table
from experiments.bench.sizes import CPU, Sizes
from experiments.util.files import write_atomic

SHORT, LONG = 16384, 65536
GROWS = ("linear_attention", "linear_attention_per_key", "delta_rule", "delta_rule_per_key", "selective_scan",
         "window_attention", "causal_conv1d", "experts", "block_sparse_attention")  # fmt: skip
"""The benchmarks whose work is in proportion to the length."""


def point(benchmark: str, implementation: str, mode: str, length: int, dtype: str = "float32") -> Point:
    return Point(benchmark, implementation, mode, Sizes(CPU, length, dtype=getattr(torch, dtype)))


HEADER = ("work", "reached", "asked for", "met", "measured")


@dataclass(frozen=True)
class Result:
    """A target's row; ``reached`` is ``None`` where it was not measured, and ``note`` says why."""

    work: str
    reached: float | None
    bound: float
    at_least: bool
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached >= self.bound if self.at_least else self.reached <= self.bound

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """A row below :data:`HEADER`."""
        reached = "not measured" if self.reached is None else f"{self.reached:.3g}"
        asked = f"{'at least' if self.at_least else 'at most'} {self.bound:g}"
        return self.work, reached, asked, {True: "yes", False: "no", None: ""}[self.met], self.note


@dataclass(frozen=True)
class Faster:
    """The time of ``slow`` over that of ``fast``: at least, or at most, a bound."""

    work: str
    slow: Point
    fast: Point
    bound: float
    at_least: bool = True

    def measure(self, budget: float) -> Result:
        device, runners = Cpu(), {}
        try:
            for key, point in {"slow": self.slow, "fast": self.fast}.items():
                torch.manual_seed(0)
                runners[key] = partial(device.seconds, point.work())
        except Absent as reason:
            return Result(self.work, None, self.bound, self.at_least, str(reason))
        try:
            times = alternate(runners, budget)
        except Failure as failure:
            return Result(self.work, None, self.bound, self.at_least, f"{failure.name}: {failure.reason}")
        rounds = min(len(found) for found in times.values())
        note = f"{1e3 * min(times['fast']):.3g} ms, {rounds} {'round' if rounds == 1 else 'rounds'}"
        return Result(self.work, ratio(times["slow"], times["fast"]), self.bound, self.at_least, note)


@dataclass(frozen=True)
class Peak:
    """The peak of memory at the longer length: over that at the shorter, or over inputs and outputs."""

    work: str
    benchmark: str
    mode: str
    growth: bool
    bound: float

    def measure(self, budget: float) -> Result:
        peak, base = self._peak(LONG), self._peak(SHORT) if self.growth else self._bytes()
        if peak is None or base is None:
            return Result(self.work, None, self.bound, False, "not measured")
        return Result(self.work, peak / base, self.bound, False, f"{peak / 1e6:.4g} MB")

    def _peak(self, length: int) -> int | None:
        return Cpu().peak(point(self.benchmark, AUTO, self.mode, length))

    def _bytes(self) -> float:
        benchmark, sizes = BENCHMARKS[self.benchmark], Sizes(CPU, LONG)
        return benchmark.cost(self.mode, sizes, benchmark.inputs(self.mode, sizes)).bytes


@dataclass(frozen=True)
class OfBandwidth:
    """The time in which a copy moves as many bytes as a model's weights have, over that of a token, in turn."""

    work: str
    benchmark: str
    length: int
    bound: float

    def measure(self, budget: float) -> Result:
        torch.manual_seed(0)
        device, benchmark, sizes = Cpu(), BENCHMARKS[self.benchmark], Sizes(CPU, self.length)
        inputs = benchmark.inputs(TOKEN, sizes)
        bytes_read, moved = benchmark.cost(TOKEN, sizes, inputs).bytes, 2 * device.copied
        works = {
            "token": benchmark.work("seqarch", TOKEN, CPU, inputs),
            "copy": timed(copying(device.copied, device.device), {}),
        }
        times = alternate({name: partial(device.seconds, work) for name, work in works.items()}, 3 * budget, rounds=100)
        least = [seconds * bytes_read / moved for seconds in times["copy"]]
        token, bandwidth = statistics.median(times["token"]), moved / statistics.median(times["copy"])
        note = f"{1 / token:.3g} tokens/s, {bandwidth / 1e9:.3g} GB/s"
        return Result(self.work, ratio(least, times["token"]), self.bound, True, note)


Target = Faster | Peak | OfBandwidth


def _against(
    work: str, benchmark: str, baseline: str, bound: float, length: int, modes: tuple[str, ...]
) -> Iterator[Target]:
    for mode in modes:
        slow, fast = (point(benchmark, name, mode, length) for name in (baseline, AUTO))
        yield Faster(f"{work}, {mode}, T = {length}, against {baseline}", slow, fast, bound)


def _recurrences() -> Iterator[Target]:
    yield from _against("linear_attention", "linear_attention", "minimal SSD", 2.5, 2048, PASSES)
    for length, bound in ((512, 1.0), (2048, 1.0), (SHORT, 20.0)):
        yield from _against("linear_attention", "linear_attention", "SDPA", bound, length, PASSES)
    for mode in PASSES:
        slow, fast = (point(f"linear_attention{name}", AUTO, mode, 2048) for name in ("_per_key", ""))
        yield Faster(f"decay per key dimension over one per head, {mode}, T = 2048", slow, fast, 1.7, at_least=False)
    yield from _against("delta_rule", "delta_rule", "transformers", 4.0, 2048, PASSES)
    yield from _against("selective_scan", "selective_scan", "step loop", 15.0, 2048, PASSES[:1])
    yield from _against("selective_scan", "selective_scan", "mambapy", 12.0, 2048, PASSES[1:])


def _attention() -> Iterator[Target]:
    yield from _against("window of 256", "window_attention", "SDPA", 10.0, 8192, PASSES[1:])
    for length, bound in ((8192, 2.0), (32768, 6.0)):
        yield from _against("16 blocks of 64", "block_sparse_attention", "SDPA", bound, length, PASSES[1:])


def _models() -> Iterator[Target]:
    for benchmark, baseline, bound in (
        ("training_mamba", "transformers, mambapy", 3.0),
        ("training_mamba_lm", "transformers, mambapy", 3.0),
        ("training_mamba", "transformers", 100.0),
    ):
        vocabulary = BENCHMARKS[benchmark].title.rpartition(", ")[2]
        slow, fast = (point(benchmark, name, "training step", 1024) for name in (baseline, "seqarch"))
        yield Faster(f"training step, 2 layers of Mamba, {vocabulary}, T = 1024, against {baseline}", slow, fast, bound)
    yield OfBandwidth("one token of Mamba 130M, of the bound by bandwidth", "decoding_mamba_130m", 64, 0.85)


def _growth() -> Iterator[Target]:
    for benchmark in GROWS:
        for mode in PASSES:
            slow, fast = (point(benchmark, AUTO, mode, length) for length in (LONG, SHORT))
            yield Faster(f"{benchmark}, {mode}, time from T = {SHORT} to {LONG}", slow, fast, 4.3, at_least=False)
            yield Peak(f"{benchmark}, {mode}, peak of memory from T = {SHORT} to {LONG}", benchmark, mode, True, 4.3)
            yield Peak(f"{benchmark}, {mode}, peak over inputs and outputs, T = {LONG}", benchmark, mode, False, 4.0)


def _bfloat16() -> Iterator[Target]:
    for benchmark in (*GROWS, "attention"):
        for mode in PASSES:
            slow, fast = (point(benchmark, AUTO, mode, 2048, dtype) for dtype in ("float32", "bfloat16"))
            yield Faster(f"{benchmark}, {mode}, T = 2048, bfloat16 against float32", slow, fast, 1.0)


def all_targets() -> list[Target]:
    return [*_recurrences(), *_bfloat16(), *_models(), *_attention(), *_growth()]


def run(only: str, folder: Path, budget: float) -> None:
    """Measure the targets whose work has ``only`` in it, ``budget`` seconds per implementation and target.

    The table is last. ``targets.json`` is renewed with each row, unless ``only`` would leave a part of them in it.
    """
    results: list[Result] = []
    prepare_folder(folder, ["targets"])
    for target in (target for target in all_targets() if only in target.work):
        results.append(target.measure(budget))
        print(f"{len(results)}. {results[-1].work}: {results[-1].cells[1]}", flush=True)
        if not only:
            kept = {"targets": [asdict(result) for result in results]} | provenance(Cpu())
            write_atomic(folder / "targets.json", json.dumps(kept, indent=1) + "\n")
    print("\n".join(text_table(HEADER, [result.cells for result in results], left=("work", "met", "measured"))))
