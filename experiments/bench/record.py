"""One contest measured over lengths: its rows, who was left out and why, and the files that hold them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.bench.contest import WAYS, Absent, Contest, Cost, Inputs, Runner
from experiments.bench.measure import Ceilings, Failure, alternate, expected, peak_memory, quartiles, ratio, rounded
from experiments.util.environment import code_version, hardware, software
from experiments.util.files import write_atomic

MEMORY_SHARE = 0.6
"""Of the machine's memory, what a call may be expected to need."""


@dataclass(frozen=True)
class Row:
    """One contestant, one way, one length. Times are of one call; what was not measured is ``None``.

    Attributes:
        rounds: how many calls the median and the quartiles are of; with 1 there is no spread.
        times_faster: than the contest's first contestant, the median over the rounds.
        share: of the nearer ceiling, 1 being all that the machine can do.
        ceiling: which one is nearer, ``"arithmetic"`` or ``"bandwidth"``.
        moved_mb: inputs and outputs, with gradients on the way back; of a model, its weights.
        peak_mb: memory at the call's peak, inputs included; not measured where one call takes longer than the budget.
    """

    contestant: str
    way: str
    length: int
    rounds: int
    median_ms: float
    quartile1_ms: float
    quartile3_ms: float
    times_faster: float | None
    share: float
    ceiling: str
    moved_mb: float
    peak_mb: float | None


@dataclass
class Record:
    """The measurements of one contest in one dtype.

    Attributes:
        absent: who cannot take part here, and why.
        left_out: what would take too long or find no room, by the lengths before it.
        failed: whose call raised an error at some length, and which.
        out_of_time: the lengths that were not begun, as the contest's time was over.
    """

    contest: str
    title: str
    dtype: str
    budget_s: float
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    out_of_time: list[int] = field(default_factory=list)

    @property
    def file(self) -> str:
        return self.name(self.contest, self.dtype)

    @staticmethod
    def name(contest: str, dtype: str) -> str:
        """Of the files of a contest, without ending."""
        return contest if dtype == "float32" else f"{contest}.{dtype}"

    def save(self, folder: Path) -> None:
        """Write ``CONTEST.json`` with everything and ``CONTEST.csv`` with the rows alone."""
        write_atomic(folder / f"{self.file}.json", json.dumps(asdict(self) | machine(), indent=1) + "\n")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [entry.name for entry in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        write_atomic(folder / f"{self.file}.csv", text.getvalue())


def machine() -> dict[str, Any]:
    """What the numbers are of; the load tells whether others worked at the same time."""
    found = hardware(torch.device("cpu")) | {"load": os.getloadavg()[0]}
    found.pop("host")
    return {"hardware": found, "software": software(), "code": code_version()[0]}


class Measurement:
    """Measures a contest: lengths one after the other, contestants in turn; no length is begun after ``deadline``."""

    def __init__(self, contest: Contest, record: Record, deadline: float = math.inf):
        self.contest, self.record, self.deadline = contest, record, deadline
        self.times: dict[tuple[str, str], dict[int, float]] = {}
        self.peaks: dict[tuple[str, str], dict[int, float]] = {}
        self.memory_limit = MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def run(self, lengths: Sequence[int]) -> Record:
        for length in (length for length in sorted(lengths) if length <= self.contest.longest):
            if time.monotonic() > self.deadline:
                self.record.out_of_time.append(length)
                continue
            for way in self.contest.ways:
                try:
                    self._length(way, length)
                except Exception as error:
                    self._fail(Failure("the contest", error), way, length)
        return self.record

    def _length(self, way: str, length: int) -> None:
        torch.manual_seed(0)
        inputs = self.contest.inputs(length, getattr(torch, self.record.dtype))
        runners = dict(self._runners(way, length, inputs))
        times = self._times(runners, way, length)
        runners.clear()  # models and optimizers go before memory is measured
        cost = WAYS[way].cost(self.contest.cost(inputs))
        first = times.get(self.contest.shown(way)[0])
        for name, seconds in times.items():
            self.record.rows.append(self._row(name, way, length, seconds, cost, first))

    def _times(self, runners: dict[str, Runner], way: str, length: int) -> dict[str, list[float]]:
        """Seconds of those whose calls raise no error."""
        while True:
            try:
                return alternate(runners, self.record.budget_s)
            except Failure as failure:
                del runners[failure.name]
                self._fail(failure, way, length)

    def _fail(self, failure: Failure, way: str, length: int) -> None:
        one = {"contestant": failure.name, "way": way, "length": length, "reason": failure.reason}
        self.record.failed.append(one)

    def _row(
        self, name: str, way: str, length: int, seconds: list[float], cost: Cost, first: list[float] | None
    ) -> Row:
        low, median, high = quartiles(seconds)
        least, ceiling = self.record.ceilings.seconds(cost, self.record.dtype)
        point = self.record.contest, name, way, length, self.record.dtype
        peak = peak_memory(point) if median <= self.record.budget_s else None
        self.times.setdefault((name, way), {})[length] = min(seconds)
        if peak is not None:
            self.peaks.setdefault((name, way), {})[length] = max(peak, 1)
        return Row(
            contestant=name,
            way=way,
            length=length,
            rounds=len(seconds),
            median_ms=rounded(1e3 * median),
            quartile1_ms=rounded(1e3 * low),
            quartile3_ms=rounded(1e3 * high),
            times_faster=None if first is None else rounded(ratio(first, seconds)),
            share=rounded(least / median),
            ceiling=ceiling,
            moved_mb=rounded(cost.bytes / 1e6),
            peak_mb=None if peak is None else rounded(peak / 1e6),
        )

    def _runners(self, way: str, length: int, inputs: Inputs) -> Iterator[tuple[str, Runner]]:
        """Those who can take part, and are expected to end in time and to find room."""
        for name in self.contest.shown(way):
            seconds = expected(self.times.get((name, way), {}), length)
            peak = expected(self.peaks.get((name, way), {}), length)
            if name in self.record.absent:
                continue
            if seconds > self.record.budget_s or peak > self.memory_limit or self._gave_up(name, way):
                why = {"expected_s": rounded(seconds), "expected_peak_mb": rounded(peak / 1e6)}
                self.record.left_out.append({"contestant": name, "way": way, "length": length, **why})
                continue
            try:
                yield name, self.contest.runner(name, way, inputs)
            except Absent as reason:
                self.record.absent[name] = str(reason)
            except Exception as error:
                self._fail(Failure(name, error), way, length)

    def _gave_up(self, name: str, way: str) -> bool:
        """Whether a shorter length was left out already, or failed."""
        gone = (*self.record.left_out, *self.record.failed)
        return any((one["contestant"], one["way"]) == (name, way) for one in gone)


def table(record: Record, way: str) -> Table:
    """What a person sees of one way."""
    shown = Table(title=f"{record.contest}, {way}, {record.dtype}\n{record.title}", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("T", justify="right")
    shown.add_column("contestant", no_wrap=True)
    for column in ("median, ms", "quartiles, ms", "calls", "ratio", "ceiling", "MB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in (row for row in record.rows if row.way == way):
        spread = f"{row.quartile1_ms:g} to {row.quartile3_ms:g}" if row.rounds > 1 else ""
        ratio = "" if row.times_faster is None else f"{row.times_faster:.2f}"
        peak = "?" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        numbers = (f"{row.median_ms:g}", spread, str(row.rounds), ratio, f"{row.share:.0%}", peak)
        shown.add_row(str(row.length), row.contestant, *numbers)
    return shown
