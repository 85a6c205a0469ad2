"""The table that the explorer shows: a row a run, with its curves and its map, and what could not be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from experiments.report.explorer_fields import Row, row_of
from experiments.report.explorer_series import Series, curves_of, map_of
from experiments.report.run_command import run_command
from experiments.runs.recorded import RecordedRun

OF_METRIC = ("name", "label", "unit", "higher_is_better")


@dataclass
class Records:
    """What was read.

    Attributes:
        rows: the runs.
        metrics: by name what :data:`OF_METRIC` names, of the first run that has it.
        series: curves of runs by kind.
        maps: the metric by depth and length, of runs that were asked at several depths and lengths.
        problems: a sentence on each thing that could not be read.
        sources: what was read, as it was given.
    """

    rows: list[Row] = field(default_factory=list)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    maps: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def add(self, run: RecordedRun, source: str) -> None:
        """Add a run; one of whose curves is damaged is not added.

        Raises:
            RunnerError: it is.
        """
        number, curves, cells = len(self.rows), curves_of(run), map_of(run)
        self.rows.append(row_of(run, source, run_command(run.config)))
        metric = run.record.get("metric", {})
        if "name" in metric:
            self.metrics.setdefault(metric["name"], {key: metric[key] for key in OF_METRIC if key in metric})
        for curve in curves:
            series = self.series.setdefault(curve.kind, Series(curve.label, curve.x_label, curve.y_label))
            series.lines.append([number, curve.x, curve.y])
        if cells is not None:
            self.maps.append({"row": number, **cells})
