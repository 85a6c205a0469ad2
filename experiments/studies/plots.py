"""Parts of the plots of several studies: seeds at a point, series of them, the style of a mixer, axes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from experiments.report.figures import bytes_text, label_ends
from experiments.runs.recorded import RecordedRun
from experiments.util.plot_style import COLOURS, INK, QUIET, family, pattern_mixers
from seqarch.layers import FAMILIES

SHAPES = ("o", "s", "^", "D", "v", "P", "X")
"""The markers of the mixers in a family: each has the one of its place in ``FAMILIES``."""


def mixer_style(pattern: str) -> dict[str, Any]:
    """Colour of the family and marker of the mixer, the same in every plot."""
    kind, mixers = family(pattern), pattern_mixers(pattern)
    places = [FAMILIES[kind].index(mixer) for mixer in mixers] if kind in FAMILIES else [0]
    return {"color": COLOURS.get(kind, INK), "marker": SHAPES[places[0] % len(SHAPES)]}


def dashed(is_other: bool) -> dict[str, Any]:
    """The line of a model that is to be told from others of its colour; a full one otherwise."""
    return {"linestyle": (0, (4, 2))} if is_other else {}


def draw_seeds(axes: Axes, x: float, values: Sequence[float], style: dict[str, Any], size: float = 4.0) -> None:
    """The seeds of one point as small marks and their range as a line."""
    axes.plot([x, x], [min(values), max(values)], "-", color=style["color"], alpha=0.35, linewidth=2.5,
              solid_capstyle="round", zorder=2)  # fmt: skip
    axes.plot([x] * len(values), values, linestyle="none", marker=style["marker"], color=style["color"], alpha=0.55,
              markersize=size, markeredgecolor="white", markeredgewidth=0.4, zorder=3)  # fmt: skip


def draw_series(
    axes: Axes, points: Sequence[tuple[float, Sequence[float]]], style: dict[str, Any], **line: Any
) -> tuple[float, float]:
    """Seeds at each x, their medians joined; the right end, for a label."""
    ordered = sorted(points, key=lambda point: point[0])
    for x, values in ordered:
        draw_seeds(axes, x, values, style)
    x, middle = [x for x, _ in ordered], [statistics.median(values) for _, values in ordered]
    axes.plot(x, middle, markersize=7, markeredgecolor="white", zorder=4, **{**style, **line})
    return x[-1], middle[-1]


def draw_band(axes: Axes, points: Sequence[tuple[float, Sequence[float]]], style: dict[str, Any], **line: Any) -> None:
    """The means at each x as a line, and the range of the seeds as a band."""
    ordered = sorted(points, key=lambda point: point[0])
    x = [x for x, _ in ordered]
    low, middle, high = ([pick(values) for _, values in ordered] for pick in (min, statistics.fmean, max))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0, zorder=1)
    axes.plot(x, middle, markeredgecolor="white", zorder=3, **{**style, **line})


def label_lines(axes: Axes, ends: Sequence[tuple[str, str, tuple[float, float]]], x: float = 1.04) -> None:
    """The names of lines beside their right ends, in the size of a study's figures."""
    label_ends(axes, ends, x, fontsize=8.5, points=13, shrink=2)


def legend_below(panels: Sequence[Axes], keys: Sequence[Artist], names: Sequence[str]) -> None:
    """The legend of all panels of a figure in one row below them, where it lies over no line."""
    figure = panels[0].get_figure(root=True)
    assert figure is not None  # of axes that were removed
    figure.legend(keys, names, fontsize=8.5, frameon=False, loc="outside lower center", ncols=len(names))


def shares(axes: Axes) -> None:
    """A y axis from nothing to all."""
    axes.set_ylim(-0.03, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def mark_chance(axes: Axes, run: RecordedRun, x: float = 0.99, label: bool = True) -> None:
    """The line of somebody who learnt nothing of the task's point."""
    metric = run.record["metric"]
    axes.axhline(metric["chance"], color=QUIET, linestyle=(0, (2, 2)), linewidth=1.2, zorder=1)
    if label:
        axes.annotate(f"chance: {metric['chance_label']}", (x, metric["chance"]), xycoords=("axes fraction", "data"),
                      xytext=(0, -3), textcoords="offset points", ha="right" if x > 0.5 else "left", va="top",
                      fontsize=8, color=QUIET)  # fmt: skip


def logarithmic(axes: Axes, ticks: Sequence[float], text: Callable[[float], str], axis: str = "x") -> None:
    """A logarithmic axis with these ticks alone."""
    (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
    one = axes.xaxis if axis == "x" else axes.yaxis
    one.set_ticks(list(ticks))
    one.set_minor_locator(NullLocator())
    one.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def byte_axis(axes: Axes, sizes: Sequence[float], every: int = 1) -> None:
    """A logarithmic x axis in bytes, with ticks at powers of two."""
    low, high = int(np.floor(np.log2(min(sizes)))), int(np.ceil(np.log2(max(sizes))))
    logarithmic(axes, [2.0**power for power in range(low, high + 1, every)], bytes_text)


def mean_and_range(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
