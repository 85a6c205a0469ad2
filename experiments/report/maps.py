"""Maps of the metric over the depth and the length of a text: a panel per model, the needle test's usual picture.

Kamradt 2023, "Needle In A Haystack - Pressure Testing LLMs". They are drawn for runs of a task whose answers have a
depth, tested at several lengths.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.report.comparison import Comparison, Setting
from experiments.report.figures import is_share, metric_label
from experiments.runs.recorded import RecordedRun
from experiments.tasks.groups import DEPTH
from experiments.util.plot_style import INK

COLOUR_MAP = "viridis"
"""Even in lightness, so that it can be read without colours and by the colour-blind."""

EMPTY = "#DDDDDD"
"""Of a cell in which nothing was asked."""

NAMED_LENGTHS = 4
"""Lengths that a panel's axis names, at most; each has its tick."""


@dataclass(frozen=True)
class Cells:
    """The metric of some runs by depth and length.

    Attributes:
        lengths: of the texts, increasing: the L columns.
        edges: of the D bins of depth: 0 is the beginning of a text, 1 its end.
        values: ``[D, L]``, the mean over all answers of all runs; NaN where nothing was asked.
    """

    lengths: list[int]
    edges: list[float]
    values: np.ndarray


@dataclass(frozen=True)
class Map(Cells):
    """The metric of one setting, over its finished seeds."""

    setting: Setting


def maps(comparison: Comparison) -> list[Map]:
    """The maps of the settings that were tested at the lengths, and in the bins, of the first that has a map.

    Ordered by the mean over all cells, the best first.
    """
    found = [(setting, cells_of(setting.finished)) for setting in comparison.shown]
    there = [Map(**vars(cells), setting=setting) for setting, cells in found if cells is not None]
    alike = [each for each in there if (each.lengths, each.edges) == (there[0].lengths, there[0].edges)]
    sign = -1 if comparison.sample["metric"]["higher_is_better"] else 1
    return sorted(alike, key=lambda each: sign * float(np.nanmean(each.values)))


def cells_of(runs: Sequence[RecordedRun], pool: int = 1) -> Cells | None:
    """The map of those runs that have one over the same cells; ``None`` where none has answers.

    Args:
        pool: so many neighbouring bins of depth make one, a divisor of their number.
    """
    seeds = [columns for columns in map(depths_by_length, runs) if len(columns) > 1]
    if not seeds:
        return None
    lengths, edges = sorted(seeds[0]), next(iter(seeds[0].values()))["edges"]
    seeds = [columns for columns in seeds if sorted(columns) == lengths]
    if any(column["edges"] != edges for columns in seeds for column in columns.values()):
        return None
    total = np.zeros((len(edges) - 1, len(lengths)))
    count = np.zeros_like(total)
    for columns in seeds:
        for place, length in enumerate(lengths):
            answers = np.array(columns[length]["count"], dtype=float)
            values = np.array(columns[length]["value"], dtype=float)  # ``None`` becomes NaN.
            total[:, place] += np.where(answers > 0, values * answers, 0.0)
            count[:, place] += answers
    total, count = (each.reshape(-1, pool, len(lengths)).sum(axis=1) for each in (total, count))
    if not count.any():
        return None
    return Cells(lengths, edges[::pool], np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))


def depths_by_length(run: RecordedRun) -> dict[int, dict[str, Any]]:
    """The metric by depth at each length, over the test splits that differ from the run's task in length alone."""
    tests = run.record["results"].get("tests", {}).values()
    alike = [test for test in tests if not {*test.get("options", {})} - {"length"}]
    return {test["length"]: test["by"][DEPTH] for test in alike if DEPTH in test.get("by", {})}


def draw_maps(drawing: Figure, panels: Sequence[Axes], comparison: Comparison) -> None:
    """A panel per setting and the colour bar that they share, on which chance is marked.

    A text begins at the top of a panel. Columns are the tested lengths, each as wide as its ratio to its neighbours on
    a logarithmic axis; those right of the dashed line are longer than any training sequence. A cell in which nothing
    was asked is grey.
    """
    drawn = maps(comparison)
    low, high = (0.0, 1.0) if is_share(comparison) else _range(drawn)
    trained_to = (comparison.sample["results"].get("curve") or {}).get("trained_to", 0)
    meshes = []
    for axes, each in zip(panels, drawn, strict=True):
        meshes.append(draw_cells(axes, each, (low, high), trained_to))
        axes.set_title(each.setting.label, color=each.setting.colour, fontsize=10)
    drawing.supylabel("Depth in the text", fontsize=10)
    drawing.supxlabel("Length of the text (tokens, logarithmic); right of the dashed line, longer than in training",
                      fontsize=10)  # fmt: skip
    _draw_colour_bar(drawing, panels, meshes[0], comparison)


def draw_cells(axes: Axes, cells: Cells, span: tuple[float, float], trained_to: int) -> QuadMesh:
    """One map onto one panel, in colours from the lower to the upper end of ``span``."""
    sides = column_edges(cells.lengths)
    axes.set_facecolor(EMPTY)
    mesh = axes.pcolormesh(sides, cells.edges, cells.values, cmap=COLOUR_MAP, vmin=span[0], vmax=span[1])
    axes.set_xscale("log", base=2)
    axes.set_xlim(sides[0], sides[-1])
    axes.set_ylim(cells.edges[-1], cells.edges[0])
    axes.set_xticks([], minor=True)
    axes.set_xticks(cells.lengths, _tick_labels(cells.lengths))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False)
    if cells.lengths[0] <= trained_to < cells.lengths[-1]:
        place = sides[bisect.bisect_right(cells.lengths, trained_to)]
        axes.axvline(place, color="white", linewidth=2.0)
        axes.axvline(place, color=INK, linewidth=1.2, linestyle=(0, (3, 2)))
    return mesh


def _draw_colour_bar(drawing: Figure, panels: Sequence[Axes], mesh: QuadMesh, comparison: Comparison) -> None:
    bar = drawing.colorbar(mesh, ax=list(panels), pad=0.015, fraction=0.04, aspect=24)
    bar.outline.set_visible(False)  # type: ignore[operator]
    label, chance = metric_label(comparison), comparison.sample["metric"]["chance"]
    if mesh.norm.vmin < chance < mesh.norm.vmax:
        bar.ax.axhline(chance, color="white", linewidth=1.6)
        label += " (white line: chance)"
    bar.set_label(label)
    if is_share(comparison):
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def column_edges(lengths: Sequence[float]) -> list[float]:
    """The sides of columns around increasing lengths, in the middle between neighbours on a logarithmic axis."""
    between = [math.sqrt(one * other) for one, other in itertools.pairwise(lengths)]
    return [lengths[0] ** 2 / between[0], *between, lengths[-1] ** 2 / between[-1]]


def _range(drawn: Sequence[Map]) -> tuple[float, float]:
    values = np.concatenate([each.values[np.isfinite(each.values)] for each in drawn])
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def _tick_labels(lengths: Sequence[int]) -> list[str]:
    """The longest is named, and of the others every second, third, ..., so that names have room."""
    every = math.ceil(len(lengths) / NAMED_LENGTHS)
    last = len(lengths) - 1
    return [_short(length) if (last - place) % every == 0 else "" for place, length in enumerate(lengths)]


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"
