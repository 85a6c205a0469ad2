"""What the project promises of a CPU, as claims about two measurements of one run: ``experiments.bench targets``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.bench.contest import AUTO, WAYS, Absent, timed
from experiments.bench.contests import CONTESTS
from experiments.bench.measure import COPIED, Failure, Point, alternate, copying, peak_memory, prepare, ratio
from experiments.bench.record import machine
from experiments.util.files import write_atomic

SHORT, LONG = 16384, 65536
GROWS = ("linear_attention", "linear_attention_per_key", "delta_rule", "delta_rule_per_key", "selective_scan",
         "window_attention", "causal_conv1d", "experts", "block_sparse_attention")  # fmt: skip
"""The contests whose work is in proportion to the length."""

PASSES = ("forward", "forward + backward")


def point(contest: str, contestant: str, way: str, length: int, dtype: str = "float32") -> Point:
    return contest, contestant, way, length, dtype


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
        """What stands under :data:`HEADER`."""
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
        try:
            runners = {}
            for key, (contest, contestant, way, length, dtype) in {"slow": self.slow, "fast": self.fast}.items():
                torch.manual_seed(0)
                inputs = CONTESTS[contest].inputs(length, getattr(torch, dtype))
                runners[key] = CONTESTS[contest].runner(contestant, way, inputs)
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
    contest: str
    way: str
    growth: bool
    bound: float

    def measure(self, budget: float) -> Result:
        peak = peak_memory(point(self.contest, AUTO, self.way, LONG))
        contest = CONTESTS[self.contest]
        base: float | None = WAYS[self.way].cost(contest.cost(contest.inputs(LONG, torch.float32))).bytes
        if self.growth:
            base = peak_memory(point(self.contest, AUTO, self.way, SHORT))
        if peak is None or base is None:
            return Result(self.work, None, self.bound, False, "not measured")
        return Result(self.work, peak / base, self.bound, False, f"{peak / 1e6:.4g} MB")


@dataclass(frozen=True)
class OfBandwidth:
    """The time in which a copy moves as many bytes as a model's weights have, over that of a token, in turn."""

    work: str
    contest: str
    length: int
    bound: float

    def measure(self, budget: float) -> Result:
        torch.manual_seed(0)
        contest = CONTESTS[self.contest]
        inputs = contest.inputs(self.length, torch.float32)
        bytes_read = contest.cost(inputs).bytes
        runners = {"token": contest.runner("seqarch", "one token", inputs), "copy": timed(copying(), {})}
        times = alternate(runners, 3 * budget, rounds=100)
        least = [seconds * bytes_read / (2 * COPIED) for seconds in times["copy"]]
        token, bandwidth = statistics.median(times["token"]), 2 * COPIED / statistics.median(times["copy"])
        note = f"{1 / token:.3g} tokens/s, {bandwidth / 1e9:.3g} GB/s"
        return Result(self.work, ratio(least, times["token"]), self.bound, True, note)


Target = Faster | Peak | OfBandwidth


def _against(work: str, contest: str, peer: str, bound: float, length: int, ways: tuple[str, ...]) -> Iterator[Target]:
    for way in ways:
        slow, fast = (point(contest, name, way, length) for name in (peer, AUTO))
        yield Faster(f"{work}, {way}, T = {length}, against {peer}", slow, fast, bound)


def _recurrences() -> Iterator[Target]:
    yield from _against("linear_attention", "linear_attention", "minimal SSD", 2.5, 2048, PASSES)
    for length, bound in ((512, 1.0), (2048, 1.0), (SHORT, 20.0)):
        yield from _against("linear_attention", "linear_attention", "SDPA", bound, length, PASSES)
    for way in PASSES:
        slow, fast = (point(f"linear_attention{name}", AUTO, way, 2048) for name in ("_per_key", ""))
        yield Faster(f"decay a key dimension over a head's, {way}, T = 2048", slow, fast, 1.7, at_least=False)
    yield from _against("delta_rule", "delta_rule", "transformers", 4.0, 2048, PASSES)
    yield from _against("selective_scan", "selective_scan", "step loop", 15.0, 2048, PASSES[:1])
    yield from _against("selective_scan", "selective_scan", "mambapy", 12.0, 2048, PASSES[1:])


def _attention() -> Iterator[Target]:
    yield from _against("window of 256", "window_attention", "SDPA", 10.0, 8192, PASSES[1:])
    for length, bound in ((8192, 2.0), (32768, 6.0)):
        yield from _against("16 blocks of 64", "block_sparse_attention", "SDPA", bound, length, PASSES[1:])


def _models() -> Iterator[Target]:
    for contest, peer, bound in (
        ("training_mamba", "transformers, mambapy", 3.0),
        ("training_mamba_lm", "transformers, mambapy", 3.0),
        ("training_mamba", "transformers", 100.0),
    ):
        vocabulary = CONTESTS[contest].title.rpartition(", ")[2]
        slow, fast = (point(contest, name, "training step", 1024) for name in (peer, "seqarch"))
        yield Faster(f"training step, 2 layers of Mamba, {vocabulary}, T = 1024, against {peer}", slow, fast, bound)
    yield OfBandwidth("one token of Mamba 130M, of the bound by bandwidth", "decoding_mamba_130m", 64, 0.85)


def _growth() -> Iterator[Target]:
    for contest in GROWS:
        for way in PASSES:
            slow, fast = (point(contest, AUTO, way, length) for length in (LONG, SHORT))
            yield Faster(f"{contest}, {way}, time from T = {SHORT} to {LONG}", slow, fast, 4.3, at_least=False)
            yield Peak(f"{contest}, {way}, peak of memory from T = {SHORT} to {LONG}", contest, way, True, 4.3)
            yield Peak(f"{contest}, {way}, peak over inputs and outputs, T = {LONG}", contest, way, False, 4.0)


def _bfloat16() -> Iterator[Target]:
    for contest in (*GROWS, "attention"):
        for way in PASSES:
            slow, fast = (point(contest, AUTO, way, 2048, dtype) for dtype in ("float32", "bfloat16"))
            yield Faster(f"{contest}, {way}, T = 2048, bfloat16 against float32", slow, fast, 1.0)


def all_targets() -> list[Target]:
    return [*_recurrences(), *_bfloat16(), *_models(), *_attention(), *_growth()]


def table(results: list[Result]) -> Table:
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in HEADER:
        shown.add_column(column, justify="right" if column in ("reached", "asked for") else "left")
    for result in results:
        shown.add_row(*result.cells)
    return shown


def run(console: Console, only: str, folder: Path, budget: float) -> None:
    """Measure the targets whose work has ``only`` in it, ``budget`` seconds a contestant and target.

    The table is last. ``targets.json`` is renewed with each row, unless ``only`` would leave a part of them in it.
    """
    results: list[Result] = []
    prepare(folder, ["targets"])
    for target in (target for target in all_targets() if only in target.work):
        results.append(target.measure(budget))
        console.print(f"{len(results)}. {results[-1].work}: {results[-1].cells[1]}", highlight=False)
        if not only:
            kept = {"targets": [asdict(result) for result in results]} | machine()
            write_atomic(folder / "targets.json", json.dumps(kept, indent=1) + "\n")
    console.print(table(results))
