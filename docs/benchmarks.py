"""The tables of docs/bench.md, from what ``python -m experiments.bench --folder docs/results/cpu`` measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "cpu"


def bench_tables() -> str:
    """A section a contest: what it measured, on which machine, and a table of times by contestant and length."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    contests = [record for record in records if "contest" in record]
    return "\n\n".join(part for record in contests for part in _section(record)) or "No measurements are kept yet."


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
        absent = "; ".join(f"{name}: {reason}" for name, reason in record["absent"].items())
        yield f"Absent: {absent}."


def _table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds and, in brackets, the share of the nearer ceiling; a dash is a length that was left out."""
    lengths = sorted({row["length"] for row in rows})
    header = ["", "contestant", *(f"T = {length}" for length in lengths)]
    lines = [header, ["---", "---", *["--:"] * len(lengths)]]
    for way, name in dict.fromkeys((row["way"], row["contestant"]) for row in rows):
        cells = {row["length"]: row for row in rows if (row["way"], row["contestant"]) == (way, name)}
        lines.append([way, name, *(_cell(cells.get(length)) for length in lengths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['median_ms']:.3g} ({row['share']:.0%})"
