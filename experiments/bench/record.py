"""The record of a benchmark: its rows, what is missing and why, the files that hold them, and their text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from experiments.bench.devices import Ceilings, Device
from experiments.bench.sizes import SETUPS
from experiments.util.environment import code_version, software
from experiments.util.errors import RunnerError, writing
from experiments.util.files import read_json, write_atomic


@dataclass(frozen=True)
class Row:
    """One implementation, one mode, some sizes. Times are of one call; what was not measured is ``None``.

    Attributes:
        width: of each head, in the benchmarks of operations; whole models have their own.
        length: tokens of a sequence; of one token, those before it and itself.
        batch: sequences.
        rounds: the number of calls that the median and the quartiles are of; with 1 there is no spread.
        times_faster: than the benchmark's first baseline, the median over the rounds.
        share: of the nearer ceiling, 1 being all that the device can do.
        ceiling: which one is nearer, ``"arithmetic"`` or ``"bandwidth"``.
        moved_mb: inputs and outputs, with gradients on the way back; of a model, its weights.
        peak_mb: memory at the call's peak, inputs included; not measured where one call takes too long.
    """

    implementation: str
    mode: str
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
    moved_mb: float
    peak_mb: float | None


@dataclass
class Record:
    """The measurements of one benchmark in one dtype on one device.

    Attributes:
        device: its kind, "cpu" or "cuda".
        checked: what was checked before anything was timed.
        absent: the implementations that cannot run here, and why.
        left_out: what would take too long or find no memory, by the sizes before it.
        failed: the implementations whose call raised an error at some sizes, and which.
        out_of_time: the lengths that were not begun, as the benchmark's time was over.
    """

    benchmark: str
    title: str
    device: str
    dtype: str
    budget_s: float
    ceilings: Ceilings
    checked: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    out_of_time: list[int] = field(default_factory=list)

    @property
    def file(self) -> str:
        return file_name(self.benchmark, self.device, self.dtype)

    def save(self, folder: Path, device: Device) -> None:
        """Write all of it as JSON, and the rows as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [each.name for each in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        write_atomic(folder / f"{self.file}.csv", text.getvalue())
        whole = asdict(self) | provenance(device)
        write_atomic(folder / f"{self.file}.json", json.dumps(whole, indent=1) + "\n")


def file_name(benchmark: str, device: str, dtype: str) -> str:
    """Of a benchmark's files, without ending; the dtype is named where it is not the device's default."""
    return benchmark if dtype == SETUPS[device].dtypes[0] else f"{benchmark}.{dtype}"


def provenance(device: Device) -> dict[str, Any]:
    """Where a record comes from: hardware, software and code."""
    return {"hardware": device.describe(), "software": software(), "code": code_version()[0]}


def prepare_folder(folder: Path, names: Iterable[str]) -> None:
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


HEADER = ("mode", "T", "B", "width", "implementation", "median, ms", "quartiles, ms", "calls", "TFLOP/s", "ratio",
          "ceiling", "MB")  # fmt: skip


def lines(record: Record) -> Iterator[str]:
    """A record as text: the rows, and what is missing."""
    yield f"{record.benchmark}, {record.dtype}: {record.title}"
    yield from text_table(HEADER, [_cells(row) for row in record.rows], left=("mode", "implementation"))
    yield from (f"{name} is absent: {reason}" for name, reason in record.absent.items())
    several = record.device == "cuda"
    for one in record.left_out:
        memory = f" and {one['expected_peak_mb']:g} MB" if one["expected_peak_mb"] else ""
        yield f"{_where(one, several)} is left out: expected are about {one['expected_s']:g} s{memory}"
    yield from (f"{_where(one, several)} failed: {one['reason']}" for one in record.failed)
    if record.out_of_time:
        yield f"for T = {', '.join(map(str, record.out_of_time))} there was no time"


def _where(one: dict[str, Any], several: bool) -> str:
    """Of what is missing; with the batch and the width where there are several."""
    shape = f"width {one['width']}, {one['batch']} x {one['length']}" if several else f"T = {one['length']}"
    return f"{one['implementation']}, {one['mode']}, {shape}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.mode,
        str(row.length),
        str(row.batch),
        str(row.width),
        row.implementation,
        f"{row.median_ms:g}",
        f"{row.quartile1_ms:g} to {row.quartile3_ms:g}" if row.rounds > 1 else "",
        str(row.rounds),
        f"{row.tflops:.3g}",
        "" if row.times_faster is None else f"{row.times_faster:.2f}",
        f"{row.share:.0%}",
        "?" if row.peak_mb is None else f"{row.peak_mb:.0f}",
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> Iterator[str]:
    """A table in plain text; the columns named in ``left`` are aligned left. A machine with a GPU may have no Rich."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    for line in (header, ["-" * width for width in widths], *rows):
        cells = (
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(header, line, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
