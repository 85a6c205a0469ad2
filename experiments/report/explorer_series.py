"""Curves and maps of recorded runs for the explorer: the metric by position, gap or length, the course of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.report.maps import depths_by_length
from experiments.runs.recorded import RecordedRun, is_finite
from experiments.util.errors import RunnerError

MOST_POINTS = 200
"""Of the course of training of one run; of more evaluations every second, third, ... is kept, and the last."""

X_LABELS = {
    "depth": "Depth in the text",
    "gap": "Gap to what is asked for (tokens)",
    "pair": "Place of the pair that is asked for",
    "position": "Position in the sequence (tokens)",
}
"""Labels of the groups that tasks tell answers apart by; another group is called by its name."""


@dataclass(frozen=True)
class Curve:
    """One curve of one run.

    Attributes:
        kind: what it is a curve of, the same for all runs: ``by/gap``.
        label: in a list of kinds.
        y_label: empty where y is the run's metric.
        x, y: its points, finite numbers.
    """

    kind: str
    label: str
    x_label: str
    y_label: str
    x: list[float]
    y: list[float]


@dataclass
class Series:
    """The curves of one kind, ``lines`` as ``[number of the run, x, y]``."""

    label: str
    x_label: str
    y_label: str
    lines: list[list[Any]] = field(default_factory=list)


def curves_of(run: RecordedRun) -> list[Curve]:
    """Every curve that a run has.

    Raises:
        RunnerError: one of them is damaged.
    """
    results = run.record.get("results", {}) if run.finished else {}
    found = [_by_group(run, name, bins) for name, bins in results.get("by", {}).items()]
    if curve := results.get("curve"):
        unit = f" ({curve['x_unit']})" if curve["x_unit"] else ""
        kind = f"along/{curve['x_label'].lower()}"
        label = f"Metric along: {curve['x_label'].lower()}"
        found.append(_curve(kind, label, curve["x_label"] + unit, "", curve["x"], curve["y"]))
    return [curve for curve in [*found, *_training(run)] if curve.x]


def _by_group(run: RecordedRun, name: str, bins: Any) -> Curve:
    is_curve = isinstance(bins, Mapping) and isinstance(bins.get("x"), list) and isinstance(bins.get("value"), list)
    if not is_curve or len(bins["x"]) != len(bins["value"]):
        raise RunnerError(f"{run.name}: its record is damaged, results.by.{name} needs an x and a value for each bin")
    label = X_LABELS.get(name, name.capitalize())
    return _curve(f"by/{name}", f"Metric by {name}", label, "", bins["x"], bins["value"])


def _training(run: RecordedRun) -> list[Curve]:
    """The metric and the loss on validation along the steps."""
    metric = run.get("metric.name")
    kinds = {f"validation_{metric}": ("training/metric", "Metric on validation", ""),
             "validation_loss": ("training/loss", "Loss on validation", "Loss on validation (nats)")}  # fmt: skip
    found = []
    for key, (kind, label, y_label) in kinds.items():
        points = [line for line in run.metrics if "step" in line and key in line]
        steps, values = ([line[name] for line in points] for name in ("step", key))
        found.append(_curve(kind, label, "Training step", y_label, *thinned(steps, values)))
    return found


def _curve(kind: str, label: str, x_label: str, y_label: str, x: Sequence[Any], y: Sequence[Any]) -> Curve:
    points = [(a, b) for a, b in zip(x, y, strict=True) if is_finite(a) and is_finite(b)]
    return Curve(kind, label, x_label, y_label, [a for a, _ in points], [b for _, b in points])


def thinned(x: list[Any], y: list[Any], most: int = MOST_POINTS) -> tuple[list[Any], list[Any]]:
    """Every second, third, ... of many points, and the last."""
    every = -(-len(x) // most)
    kept = [place for place in range(len(x)) if place % every == 0 or place == len(x) - 1]
    return [x[place] for place in kept], [y[place] for place in kept]


def map_of(run: RecordedRun) -> dict[str, Any] | None:
    """The metric of a run by depth, at each of several lengths: ``values`` and ``counts`` are ``[L][D]``.

    ``None`` where it was not asked at several lengths, or the bins of depth differ between them.
    """
    columns = depths_by_length(run) if run.finished else {}
    lengths = sorted(columns)
    edges = [columns[length]["edges"] for length in lengths]
    if len(lengths) < 2 or any(each != edges[0] for each in edges):
        return None
    return {
        "lengths": lengths,
        "edges": edges[0],
        "values": [[value if is_finite(value) else None for value in columns[length]["value"]] for length in lengths],
        "counts": [columns[length]["count"] for length in lengths],
    }
