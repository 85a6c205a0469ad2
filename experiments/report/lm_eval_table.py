"""The table of a report with what its runs reached on tasks of the lm-evaluation-harness."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from experiments.report.comparison import Comparison, Setting
from experiments.runs.recorded import RecordedRun
from experiments.util.blocks import table

Key = tuple[str, str, Any, Any]
"""Task, metric, shots and number of texts: what must be equal for numbers to be compared."""


def lm_eval_table(comparison: Comparison) -> str | None:
    """A row for each task and metric, a column for each model; ``None`` where no run has any.

    Of each run it takes the model that was tested, and of several scores of the same task the latest.
    """
    found = {setting.label: [dict(_latest(run)) for run in setting.finished] for setting in comparison.shown}
    keys = dict.fromkeys(key for runs in found.values() for values in runs for key in values)
    if not keys:
        return None
    labels = [setting.label for setting in comparison.shown]
    rows = [
        [*map(str, key), *(_cell(key, found[setting.label], setting) for setting in comparison.shown)]
        for key in sorted(keys, key=lambda key: tuple(map(str, key)))
    ]
    return table(["Task", "Metric", "Shots", "Texts", *labels], rows, align="---:", left=2)


def _latest(run: RecordedRun) -> Iterator[tuple[Key, float]]:
    tested = run.get("results.checkpoint")
    for line in run.lm_eval:
        if tested is None or line.get("checkpoint") == tested:
            for task, entry in line["tasks"].items():
                for metric, each in entry["metrics"].items():
                    yield (task, metric, entry["shots"], entry["texts"]), each["value"]


def _cell(key: Key, runs: list[dict[Key, float]], setting: Setting) -> str:
    """The median over seeds with its range, and how many of them have it where some do not."""
    values = [run[key] for run in runs if key in run]
    if not values:
        return ""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    some = f", {len(values)} of {len(setting.finished)}" if len(values) < len(setting.finished) else ""
    return f"{statistics.median(values):.3f}{spread}{some}"
