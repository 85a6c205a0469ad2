"""The tables of docs/bench.md, from what ``python -m experiments.bench --folder docs/results/cpu`` measured, its
``targets`` too, and what ``python -m experiments.bench.gpu`` left in docs/results/gpu."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.bench.gpu.contests import GPU_CONTESTS
from experiments.bench.targets import HEADER, Result
from experiments.util.blocks import table

RESULTS = Path(__file__).parent / "results" / "cpu"
GPU_RESULTS = Path(__file__).parent / "results" / "gpu"


def bench_tables() -> str:
    """A section a contest: what it measured, on which machine, and a table of times by contestant and length."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    contests = [record for record in records if "contest" in record]
    return "\n\n".join(part for record in contests for part in _section(record)) or "No measurements are kept yet."


def kept_targets() -> tuple[list[Result], dict[str, Any]]:
    """The results of the kept run, and its machine and versions."""
    kept = json.loads((RESULTS / "targets.json").read_text(encoding="utf-8"))
    return [Result(**row) for row in kept.pop("targets")], kept


def target_table() -> str:
    """The project's targets beside what was reached, and on which machine."""
    results, kept = kept_targets()
    machine = kept["hardware"]
    return (
        f"{sum(each.met is True for each in results)} of {len(results)} are met. {machine['cpu']}, {machine['threads']}"
        f" threads, load {machine['load']:.1f} at the end, torch {kept['software']['packages']['torch']}, code"
        f" {str(kept['code']['commit'])[:10]}.\n\n" + table(HEADER, (each.cells for each in results))
    )


def _section(record: dict[str, Any]) -> Iterator[str]:
    machine, ceilings = record["hardware"], record["ceilings"]
    flops = ceilings["flops"][record["dtype"]] / 1e9
    yield f"### {record['contest']}, {record['dtype']}"
    yield (
        f"{record['title']}. {machine['cpu']}, {machine['threads']} threads, load {machine['load']:.1f} at the end,"
        f" torch {record['software']['packages']['torch']}; ceilings {flops:.0f} GFLOP/s and"
        f" {ceilings['bandwidth'] / 1e9:.0f} GB/s."
    )
    yield _table(record["rows"])
    if record["absent"]:
        yield _absent(record)
    if record["failed"]:
        failed = "; ".join(f"{each['contestant']}, {each['way']}, T = {each['length']}: {each['reason']}"
                           for each in record["failed"])  # fmt: skip
        yield f"Failed: {failed}."


def _table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds and, in brackets, the share of the nearer ceiling; a dash is where there is no time."""
    lengths = sorted({row["length"] for row in rows})
    header, lines = ["", "contestant", *(f"T = {length}" for length in lengths)], []
    for way, name in dict.fromkeys((row["way"], row["contestant"]) for row in rows):
        cells = {row["length"]: row for row in rows if (row["way"], row["contestant"]) == (way, name)}
        lines.append([way, name, *(_cell(cells.get(length)) for length in lengths)])
    return table(header, lines, align="--:", left=2)


def _cell(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['median_ms']:.3g} ({row['share']:.0%})"


def gpu_tables() -> str:
    """Which contests were measured on a GPU, and those that were: what it was, and a table a contest."""
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(GPU_RESULTS.glob("*.json"))}
    measured = {record["contest"] for record in records.values()}
    overview = table(
        ("contest", "", ""),
        ((name, contest.title, "measured" if name in measured else "not measured")
         for name, contest in GPU_CONTESTS.items()),
    )  # fmt: skip
    return "\n\n".join([overview, *(part for record in records.values() for part in _gpu_section(record))])


def _gpu_section(record: dict[str, Any]) -> Iterator[str]:
    device, ceilings, packages = record["device"], record["ceilings"], record["software"]["packages"]
    yield f"### {record['contest']}, {record['dtype']}, on a GPU"
    yield (
        f"{record['title']}. {device['name']}, driver {device['driver']}, torch {packages['torch']},"
        f" Triton {packages.get('triton', 'not installed')}, commit {str(record['code']['commit'])[:10]}; ceilings"
        f" {ceilings['flops'][record['dtype']] / 1e12:.3g} TFLOP/s and {ceilings['bandwidth'] / 1e9:.0f} GB/s;"
        f" {record['checked'].get('passed', 0)} checks passed before."
    )
    rows = record["rows"]
    shapes = sorted({(row["length"], row["batch"]) for row in rows})
    header, lines = ["", "width", "contestant", *(f"{batch} x {length}" for length, batch in shapes)], []
    for way, width, name in dict.fromkeys((row["way"], row["width"], row["contestant"]) for row in rows):
        own = [row for row in rows if (row["way"], row["width"], row["contestant"]) == (way, width, name)]
        cells = {(row["length"], row["batch"]): row for row in own}
        lines.append([way, str(width), name, *(_cell(cells.get(each)) for each in shapes)])
    yield table(header, lines, align="--:", left=3)
    if record["absent"]:
        yield _absent(record)


def _absent(record: dict[str, Any]) -> str:
    return f"Absent: {'; '.join(f'{name}: {reason}' for name, reason in record['absent'].items())}."
