"""The plots of a report: each draws one comparison onto axes it is given."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import chain, count
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from experiments.report.comparison import Comparison, Setting
from experiments.runs.recorded import RecordedRun
from experiments.util.plot_style import DASHES, INK, MARKERS, QUIET, pattern_mixers, spread
from seqarch.layers import FAMILIES

LABEL_WIDTH = 0.22
"""Names closer than this share of the axis may cover one another."""

FEW_POINTS = 12
"""Up to so many points of a curve have a dot each: what was measured, between which the line is drawn."""


def strokes(comparison: Comparison) -> dict[str, int]:
    """A number by label, distinct among the settings of a colour: of its dash and, beyond those, its marker.

    The first setting of a mixer has the dash of that mixer, the same in every figure.
    """
    taken: dict[str, int] = {}
    for setting in sorted(comparison.shown, key=lambda setting: setting.label):
        members = FAMILIES.get(setting.family, ())
        own = [members.index(mixer) for mixer in pattern_mixers(setting.pattern) if mixer in members]
        used = {taken[other.label] for other in comparison.shown
                if other.label in taken and other.colour == setting.colour}  # fmt: skip
        taken[setting.label] = next(number for number in chain(own, count(len(members))) if number not in used)
    return taken


def line_style(number: int) -> dict[str, Any]:
    marker = MARKERS[number // len(DASHES) % len(MARKERS)]
    return {"linestyle": DASHES[number % len(DASHES)], "marker": marker, "markersize": 5, "markevery": 0.1}


def test_of(run: RecordedRun) -> float:
    return run.result("test")


def metric_label(comparison: Comparison) -> str:
    metric = comparison.sample["metric"]
    return metric["label"] + (f" ({metric['unit']})" if metric["unit"] and metric["unit"] != "bits/byte" else "")


def is_share(comparison: Comparison) -> bool:
    return comparison.sample["metric"]["unit"] == ""


def draw_ranking(axes: Axes, comparison: Comparison) -> None:
    """One row per model, best on top: its seeds as points, the median as a stroke, the range as a line."""
    shown = comparison.shown
    for row, setting in enumerate(reversed(shown)):
        values = setting.values(test_of)
        jitter = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else [0.0]
        axes.plot([min(values), max(values)], [row, row], color=setting.colour, alpha=0.35, linewidth=6,
                  solid_capstyle="round")  # fmt: skip
        axes.plot(values, row + np.asarray(jitter), "o", color=setting.colour, markersize=6, markeredgecolor="white",
                  markeredgewidth=0.8)  # fmt: skip
        middle = statistics.median(values)
        axes.plot([middle, middle], [row - 0.3, row + 0.3], color=setting.colour, linewidth=2.4)
        text = f"{middle:.3f}" if is_share(comparison) else f"{middle:.2f}"
        axes.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(shown)), [setting.label for setting in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.1)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.annotate("median", (1.01, 1.0), xycoords="axes fraction", va="top", fontsize=8, color=QUIET)
    axes.set_xlabel(f"{metric_label(comparison)} on test")
    if is_share(comparison):
        axes.set_xlim(-0.02, 1.03)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _mark_chance(axes, comparison, vertical=True)


def _mark_chance(axes: Axes, comparison: Comparison, vertical: bool, label: bool = True) -> None:
    metric = comparison.sample["metric"]
    line = axes.axvline if vertical else axes.axhline
    line(metric["chance"], color=QUIET, linestyle=(0, (2, 2)), linewidth=1.2, zorder=1)
    if not label:
        return
    text = f"chance: {metric['chance_label']}"
    if vertical:
        low, high = axes.get_xlim()
        on_left = metric["chance"] - low < 0.55 * (high - low)
        axes.annotate(text, (metric["chance"], 0.995), xycoords=("data", "axes fraction"), fontsize=8, color=QUIET,
                      xytext=(4 if on_left else -4, 0), textcoords="offset points", va="top",
                      ha="left" if on_left else "right")  # fmt: skip
    else:
        # On the side on which no model should be, where there is room for it.
        is_below = metric["higher_is_better"] and metric["chance"] - axes.get_ylim()[0] > _line_height(axes)
        axes.annotate(text, (0.99, metric["chance"]), xycoords=("axes fraction", "data"), fontsize=8, color=QUIET,
                      xytext=(0, -3 if is_below else 3), textcoords="offset points", ha="right",
                      va="top" if is_below else "bottom",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip


def draw_training(panels: Sequence[Axes], comparison: Comparison) -> None:
    """One panel per model: each seed's validation metric against the step, with the other models in grey behind."""
    key = f"validation_{comparison.sample['metric']['name']}"
    shown = comparison.shown
    for axes, setting in zip(panels, shown, strict=True):
        for other in shown:
            for run in other.finished:
                _draw_steps(axes, run, key, color="#DDDDDD", linewidth=0.9, zorder=1.5)
        for run in setting.finished:
            _draw_steps(axes, run, key, color=setting.colour, linewidth=1.6, zorder=3)
            steps, values = _steps(run, key)
            last = (steps[-1:], values[-1:], "o")
            axes.plot(*last, color=setting.colour, markeredgecolor="white", zorder=4, clip_on=False)
        axes.set_title(setting.label, color=setting.colour, fontsize=10)
        axes.set_xlabel("Training step")
        axes.set_xlim(left=0)
        if is_share(comparison):
            axes.set_ylim(-0.03, 1.05)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            _mark_chance(axes, comparison, vertical=False, label=False)
    panels[0].set_ylabel(f"{metric_label(comparison)}\non validation")


def _steps(run: RecordedRun, key: str) -> tuple[list[int], list[float]]:
    lines = [line for line in run.metrics if isinstance(line.get(key), (int, float))]
    return [line["step"] for line in lines], [line[key] for line in lines]


def _draw_steps(axes: Axes, run: RecordedRun, key: str, **style) -> None:
    axes.plot(*_steps(run, key), **style)


def curves(comparison: Comparison) -> list[tuple[Setting, list[dict[str, Any]]]]:
    """The settings that have the metric along something, each with its seeds' curves: those along the same points.

    A curve that is no number somewhere is left out.
    """
    found = []
    for setting in comparison.shown:
        recorded = [run.record["results"].get("curve") for run in setting.finished]
        found.append((setting, [curve for curve in recorded if curve and np.isfinite(curve["y"]).all()]))
    points = next((own[0]["x"] for _, own in found if own), None)
    same = [(setting, [curve for curve in own if curve["x"] == points]) for setting, own in found]
    return [(setting, own) for setting, own in same if own]


def draw_curve(axes: Axes, comparison: Comparison) -> None:
    """The metric along the task's own axis, such as the position in the file: seeds thin, their median thick."""
    drawn = curves(comparison)
    first = drawn[0][1][0]
    ends, numbers = [], strokes(comparison)
    for setting, own in drawn:
        x, middle = first["x"], np.median([curve["y"] for curve in own], axis=0)
        if len(own) > 1:
            for curve in own:
                axes.plot(x, curve["y"], color=setting.colour, alpha=0.35, linewidth=0.8)
        axes.plot(x, middle, color=setting.colour, **line_style(numbers[setting.label]))
        if len(x) <= FEW_POINTS:
            axes.plot(x, middle, "o", color=setting.colour, markersize=3.5, clip_on=False)
        ends.append((setting.label, setting.colour, (x[-1], float(middle[-1]))))
    axes.set_xscale("log", base=2)
    axes.set_xlim(first["x"][0], first["x_end"])
    _powers_of_two(axes, lambda value: f"{value:,.0f}")
    axes.set_xlabel(f"{first['x_label']} ({first['x_unit']}, logarithmic)")
    axes.set_ylabel(metric_label(comparison))
    if is_share(comparison):
        axes.set_ylim(-0.02, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _mark_chance(axes, comparison, vertical=False)
    label_ends(axes, ends)
    trained_to = first.get("trained_to")
    if trained_to and trained_to < first["x"][-1]:
        share = math.log(trained_to / first["x"][0]) / math.log(first["x_end"] / first["x"][0])
        mark_length(axes, trained_to, side="left" if share > LABEL_WIDTH else "right")


def mark_length(axes: Axes, length: float, side: str = "left") -> None:
    """A line at the length of training sequences, with a word on its left or right."""
    axes.axvline(length, color=QUIET, linestyle=":", linewidth=1.2, zorder=1)
    axes.annotate(f" trained to {length:,} ", (length, 0.015), xycoords=("data", "axes fraction"),
                  ha="right" if side == "left" else "left", va="bottom", fontsize=8, color=QUIET)  # fmt: skip


def _powers_of_two(axes: Axes, text: Callable[[float], str]) -> None:
    """Ticks at every power of two, or every second, third, ... if there would be more than eight."""
    low, high = (math.log2(bound) for bound in axes.get_xlim())
    every = math.ceil((high - low) / 8)
    exponents = range(math.ceil(high) // every * every, math.ceil(low) - 1, -every)
    axes.set_xticks([2.0**exponent for exponent in exponents if low - 1e-9 <= exponent <= high + 1e-9])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def label_ends(
    axes: Axes,
    ends: Sequence[tuple[str, str, tuple[float, float]]],
    x: float = 1.05,
    fontsize: float = 9,
    points: float = 15,
    shrink: float = 1,
) -> None:
    """Names with colours beside the right ends of lines, moved apart where these end close together.

    Args:
        ends: each line's name, colour and right end.
        x: the place of the names, as a share of the axes' width.
        points: the height of a name with some air.
        shrink: points between a line's end and the stroke that leads to its name.
    """
    low, high = axes.get_ylim()
    gap = _line_height(axes, points)
    for (label, colour, end), y in zip(ends, spread([end[1] for *_, end in ends], gap, low, high), strict=True):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": shrink,
                  "relpos": (0, 0.5)}  # fmt: skip
        axes.annotate(label, end, xytext=(x, y), textcoords=("axes fraction", "data"), color=colour,
                      fontsize=fontsize, va="center", annotation_clip=False, arrowprops=leader)  # fmt: skip


def draw_cost(axes: Axes, comparison: Comparison) -> None:
    """Quality against the bytes of state that a model carries at the longest position."""
    shown = comparison.shown
    sizes = [setting.finished[0].record["model"]["state_bytes"] for setting in shown]
    least = least_size(sizes)
    sizes = [size or least for size in sizes]
    for setting, size in zip(shown, sizes, strict=True):
        values = setting.values(test_of)
        axes.plot([size] * len(values), values, "-", color=setting.colour, alpha=0.35, linewidth=4,
                  solid_capstyle="round")  # fmt: skip
        middle = statistics.median(values)
        axes.plot([size], [middle], "o", color=setting.colour, markersize=8, markeredgecolor="white")
    axes.set_xscale("log", base=2)
    room = max(max(sizes) / min(sizes), 4) ** 0.18
    axes.set_xlim(min(sizes) / room, max(sizes) * room)
    _powers_of_two(axes, lambda size: bytes_text(0 if size <= least else size))
    length = comparison.sample["model"]["state_length"]
    axes.set_xlabel(f"State after {length:,} tokens (bytes, logarithmic)")
    axes.set_ylabel(f"{metric_label(comparison)} on test")
    axes.margins(y=0.15)
    if is_share(comparison):
        axes.set_ylim(-0.08, 1.1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _mark_chance(axes, comparison, vertical=False)
    _label_points(axes, shown, sizes)


def least_size(sizes: Sequence[float]) -> float:
    """The place of models without a state on a logarithmic axis: a power of two below all others; 0 if there are none.

    The axis has no place for 0 bytes.
    """
    if min(sizes) > 0:
        return 0.0
    return 2.0 ** (math.floor(math.log2(min((size for size in sizes if size), default=4.0))) - 2)


def _label_points(axes: Axes, shown: Sequence[Setting], sizes: Sequence[float]) -> None:
    """Names above their points, or below where another name is there already."""
    line = _line_height(axes)
    taken: list[tuple[float, float]] = []
    for setting, size in zip(shown, sizes, strict=True):
        values = setting.values(test_of)
        above, below = max(values) + 0.8 * line, min(values) - 0.8 * line
        x = math.log(size, axes.get_xlim()[1] / axes.get_xlim()[0])
        crowded = any(abs(x - other) < LABEL_WIDTH and abs(above - y) < line for other, y in taken)
        y = below if crowded else above
        taken.append((x, y))
        axes.annotate(setting.label, (size, y), ha="center", va="center", fontsize=9, color=setting.colour)


def _line_height(axes: Axes, points: float = 15) -> float:
    """The height of a line of text with some air, in the units of the y axis."""
    low, high = axes.get_ylim()
    inches = axes.get_position().height * axes.get_figure(root=True).get_size_inches()[1]  # type: ignore[union-attr]
    return points / (72 * inches) * (high - low)


def bytes_text(value: float) -> str:
    """``65536`` as ``64 KiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.{4 if value >= 1000 * size else 3}g} {unit}"
    return f"{value:.0f} B"
