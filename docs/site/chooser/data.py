"""The data of the chooser as scripts, since a page that is opened from a folder may fetch no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from docs.site.chooser.families import families
from docs.site.chooser.formulas import WIDTHS, tables
from docs.site.chooser.measured import measured
from experiments.util.files import write_atomic
from experiments.util.paths import ROOT

RESULTS = ROOT / "docs" / "results"


def bench(results: Path = RESULTS) -> dict[str, float]:
    """What the bench has measured of its machine: GB/s that are read, and GFLOP/s in float32; medians of its runs."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((results / "cpu").glob("*.json"))]
    ceilings = [each["ceilings"] for each in found if "ceilings" in each and "float32" in each["ceilings"]["flops"]]
    return {
        "bandwidth": round(median(each["bandwidth"] for each in ceilings) / 1e9, 1),
        "arithmetic": round(median(each["flops"]["float32"] for each in ceilings) / 1e9),
    }


def write(folder: Path, widths: Sequence[int] = WIDTHS, results: Path = RESULTS) -> None:
    """Write the scripts, each of which sets one global name; one that is damaged leaves the others."""
    folder.mkdir(parents=True, exist_ok=True)
    script(folder / "chooser-formulas.js", "seqarchFormulas", {**tables(widths), "bench": bench()})
    script(folder / "chooser-measured.js", "seqarchMeasured", measured(results))
    script(folder / "chooser-families.js", "seqarchFamilies", families())


def script(file: Path, name: str, value: Any) -> None:
    """A script that sets a global name to a value of JSON."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    write_atomic(file, f"globalThis.{name} = {text};\n")
