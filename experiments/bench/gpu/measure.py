"""Measures contests on a device: passes over many tokens and single ones, contestants in turn, and keeps the record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.bench.contest import WAYS, Absent, Call, Cost, Inputs
from experiments.bench.gpu.contests import GpuContest, Shape, decoding, token_cost
from experiments.bench.measure import Ceilings, alternate, expected, quartiles, ratio, rounded
from experiments.util.environment import code_version, software
from experiments.util.files import write_atomic

LENGTHS = tuple(2**exponent for exponent in range(10, 18))
TOKENS = 2**17
Work = Callable[[], object]
Prepare = Callable[[Call, Inputs], Work]
LONGEST = 5.0
"""Seconds that a call may be expected to take, and no longer."""


@dataclass(frozen=True)
class GpuRow:
    """One contestant, way, width and length; ``times_faster`` than the first of the contest's that is no backend."""

    contestant: str
    way: str
    width: int
    length: int
    batch: int
    rounds: int
    median_ms: float
    quartile1_ms: float
    quartile3_ms: float
    tflops: float
    times_faster: float | None
    share: float
    ceiling: str
    peak_mb: float


@dataclass
class GpuRecord:
    """The measurements of one contest: what was checked before, on what, and who was absent or left out, and why."""

    contest: str
    title: str
    dtype: str
    ceilings: Ceilings
    checked: dict[str, Any]
    device: dict[str, Any]
    rows: list[GpuRow] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def name(contest: str, dtype: str) -> str:
        """Of the file of a contest, without ending."""
        return contest if dtype == "bfloat16" else f"{contest}.{dtype}"

    def save(self, folder: Path) -> None:
        told = asdict(self) | {"software": software(), "code": code_version()[0]}
        write_atomic(folder / f"{self.name(self.contest, self.dtype)}.json", json.dumps(told, indent=1) + "\n")


def forward(call: Call, inputs: Inputs) -> Work:
    return torch.no_grad()(lambda: call(**inputs))


def forward_backward(call: Call, inputs: Inputs) -> Work:
    """With the gradients of all inputs that have one."""
    leaves = {
        name: x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    asked = [x for x in leaves.values() if torch.is_tensor(x) and x.requires_grad]
    cotangent: list[torch.Tensor] = []

    def work() -> object:
        output = call(**leaves)
        if not cotangent:
            cotangent.append(torch.randn_like(output))
        return torch.autograd.grad(output, asked, cotangent[0], allow_unused=True)

    return work


PASSES = {"forward": forward, "forward + backward": forward_backward}
TOKEN = "one token"


class Measurement:
    """Measures one contest on a device; ``seconds`` bounds the time of a contestant, way and shape."""

    def __init__(self, contest: GpuContest, record: GpuRecord, device: Any, seconds: float):
        self.contest, self.record, self.device, self.budget = contest, record, device, seconds
        self.known: dict[tuple[str, str, int], dict[int, float]] = {}

    def passes(self, batch: int, length: int, width: int) -> None:
        """Forward, and forward with backward, of so many sequences."""
        shape = self._shape(batch, length, width)
        inputs = self.contest.inputs(shape)
        cost = self.contest.cost(shape, inputs)
        for way, prepare in PASSES.items():
            self._way(way, shape, inputs, prepare, WAYS[way].cost(cost))

    def token(self, batch: int, length: int, width: int) -> None:
        """One token of so many sequences, after that many others."""
        shape = self._shape(batch, length, width)
        inputs = decoding(self.contest, shape)
        self._way(TOKEN, shape, inputs, forward, token_cost(self.contest, shape, inputs))

    def _shape(self, batch: int, length: int, width: int) -> Shape:
        torch.manual_seed(0)
        return Shape(batch, length, width, getattr(torch, self.record.dtype), self.device.device)

    def _way(self, way: str, shape: Shape, inputs: Inputs, prepare: Prepare, cost: Cost) -> None:
        works = dict(self._works(way, shape, inputs, prepare))
        runners = {name: (lambda work=work: self.device.seconds(work)) for name, work in works.items()}
        times = alternate(runners, self.budget)
        peers = [name for name in times if name in self.contest.peers]
        for name, seconds in times.items():
            self.known.setdefault((name, way, shape.width), {})[shape.length] = min(seconds)
            first = ratio(times[peers[0]], seconds) if peers else None
            peak = self.device.peak(works[name])
            self.record.rows.append(self._row(name, way, shape, seconds, cost, first, peak))
        self.device.free()

    def _row(
        self, name: str, way: str, shape: Shape, seconds: list[float], cost: Cost, first: float | None, peak: int
    ) -> GpuRow:
        low, median, high = quartiles(seconds)
        least, ceiling = self.record.ceilings.seconds(cost, self.record.dtype)
        return GpuRow(
            contestant=name, way=way, width=shape.width, length=shape.length, batch=shape.batch, rounds=len(seconds),
            median_ms=rounded(1e3 * median), quartile1_ms=rounded(1e3 * low), quartile3_ms=rounded(1e3 * high),
            tflops=rounded(cost.flops / median / 1e12), times_faster=None if first is None else rounded(first),
            share=rounded(least / median), ceiling=ceiling, peak_mb=rounded(peak / 1e6),
        )  # fmt: skip

    def _works(self, way: str, shape: Shape, inputs: Inputs, prepare: Prepare) -> Iterator[tuple[str, Work]]:
        """Those who can take part, each tried once: a call that runs out of memory, or fails, is left out and why."""
        for name, contestant in self.contest.contestants.items():
            try:
                work = prepare(*contestant.enter(inputs))
            except (Absent, ImportError) as reason:
                self.record.absent.setdefault(name, str(reason))
                continue
            if (told := self._fails(name, way, shape, work)) is None:
                yield name, work
            else:
                row = {"contestant": name, "way": way, "width": shape.width, "length": shape.length}
                self.record.left_out.append(row | {"batch": shape.batch, "why": told})

    def _fails(self, name: str, way: str, shape: Shape, work: Work) -> str | None:
        before = self.known.get((name, way, shape.width), {})
        if (seconds := expected(before, shape.length)) > LONGEST:
            return f"expected are {seconds:.3g} s"
        try:
            first = self.device.seconds(work)
        except torch.OutOfMemoryError:
            self.device.free()
            return "out of memory"
        except RuntimeError as error:  # a peer's kernel that does not take this shape is no reason to stop
            if name not in self.contest.peers:
                raise
            return str(error).splitlines()[0]
        return f"a call took {first:.3g} s" if first > LONGEST else None


def lines(record: GpuRecord) -> Iterator[str]:
    """What a person sees."""
    yield f"{record.contest}: {record.title}, {record.dtype}"
    for row in record.rows:
        faster = "" if row.times_faster is None else f"{row.times_faster:8.2f}x"
        yield (
            f"{row.way:19} width {row.width:4} {row.batch:4} x {row.length:6} {row.contestant:24}"
            f" {row.median_ms:10.4g} ms {row.tflops:8.4g} TFLOP/s {row.share:6.1%} {row.peak_mb:8.0f} MB {faster}"
        )
    yield from (f"{name} is absent: {reason}" for name, reason in record.absent.items())
    for one in record.left_out:
        where = f"{one['contestant']}, {one['way']}, width {one['width']}, {one['batch']} x {one['length']}"
        yield f"{where} is left out: {one['why']}"
