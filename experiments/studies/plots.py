"""Parts of the plots of several studies: a setting's seeds along an axis, its colour and marker, tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from experiments.report.comparison import Comparison, Setting, listed
from experiments.report.figures import bytes_text, label_ends, test_of
from experiments.runs.recorded import RecordedRun
from experiments.util.errors import RunnerError
from experiments.util.plot_style import COLOURS, INK, QUIET, family, pattern_mixers
from seqarch.layers import FAMILIES

SHAPES = ("o", "s", "^", "D", "v", "P", "X")
"""The markers of the mixers in a family: each has the one of its place in ``FAMILIES``."""


def mixer_style(pattern: str) -> dict[str, Any]:
    """Colour of the family and marker of the mixer, the same in every plot."""
    kind, mixers = family(pattern), pattern_mixers(pattern)
    places = [FAMILIES[kind].index(mixer) for mixer in mixers] if kind in FAMILIES else [0]
    return {"color": COLOURS.get(kind, INK), "marker": SHAPES[places[0] % len(SHAPES)]}


def model_name(setting: Setting) -> str:
    """The model's name, without that in which its settings differ."""
    return setting.label.partition(" (")[0]


def by_model(comparison: Comparison) -> dict[str, list[Setting]]:
    """The settings of each model that have a finished run, by the model's name."""
    names = sorted({model_name(setting) for setting in comparison.shown})
    return {name: [setting for setting in comparison.shown if model_name(setting) == name] for name in names}


def state_bytes(setting: Setting) -> int:
    """The state of a model. All have one; 0 bytes have no place on a logarithmic axis, nor a ratio to others.

    Raises:
        RunnerError: the records say otherwise.
    """
    run = setting.finished[0]
    if (found := run.record["model"]["state_bytes"]) <= 0:
        raise RunnerError(f"the record of {run.path} has a state of {found} bytes, expected more than 0")
    return found


def parameters(setting: Setting) -> int:
    return setting.finished[0].record["model"]["parameters"]


def median_of(setting: Setting) -> float:
    return setting.median(test_of)


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


def draw_failures(axes: Axes, places: Sequence[float], style: dict[str, Any]) -> None:
    """Crosses at the bottom where runs failed."""
    for x in places:
        axes.plot([x], [0.02], "x", color=style["color"], markersize=7, transform=axes.get_xaxis_transform(), zorder=5)


def label_lines(axes: Axes, ends: Sequence[tuple[str, str, tuple[float, float]]], x: float = 1.04) -> None:
    """The names of lines beside their right ends, in the size of a study's figures."""
    label_ends(axes, ends, x, fontsize=8.5, points=13, shrink=2)


def shares(axes: Axes) -> None:
    """A y axis from nothing to all."""
    axes.set_ylim(-0.03, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def mark_chance(axes: Axes, run: RecordedRun, x: float = 0.99) -> None:
    metric = run.record["metric"]
    axes.axhline(metric["chance"], color=QUIET, linestyle=(0, (2, 2)), linewidth=1.2, zorder=1)
    axes.annotate(f"chance: {metric['chance_label']}", (x, metric["chance"]), xycoords=("axes fraction", "data"),
                  xytext=(0, -3), textcoords="offset points", ha="right" if x > 0.5 else "left", va="top", fontsize=8,
                  color=QUIET)  # fmt: skip


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


def draw_rows(axes: Axes, rows: Sequence[tuple[str, dict[str, Any], Sequence[float]]], digits: int = 3) -> None:
    """A row each, the first on top: its seeds, their range and their median, with the median as text."""
    for row, (_, style, values) in enumerate(reversed(rows)):
        middle = statistics.median(values)
        axes.plot([min(values), max(values)], [row, row], color=style["color"], alpha=0.35, linewidth=5,
                  solid_capstyle="round")  # fmt: skip
        jitter = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(values, row + jitter, linestyle="none", marker=style["marker"], color=style["color"], markersize=5,
                  markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
        axes.plot([middle, middle], [row - 0.3, row + 0.3], color=style["color"], linewidth=2.2)
        axes.annotate(
            f"{middle:.{digits}f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8.5
        )
    axes.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def grid_text(comparison: Comparison) -> str:
    """``0.003, 0.01``: the learning rates that were chosen among, of all settings together, and the weight decays."""
    rates = sorted({rate for setting in comparison.settings for rate in setting.grid["train.lr"]})
    decays = comparison.grids.get("train.weight_decay")
    return listed(rates) + (f" and weight decays {listed(decays)}" if decays else "")


def nearest(settings: Sequence[Setting], size: float) -> Setting:
    """The setting whose state is nearest to so many bytes, by ratio."""
    return min(settings, key=lambda setting: abs(np.log(state_bytes(setting) / size)))


def ends(settings: Sequence[Setting]) -> tuple[float, float]:
    """The median results at the smallest and at the largest state."""
    ordered = sorted(settings, key=state_bytes)
    return median_of(ordered[0]), median_of(ordered[-1])


def table(comparison: Comparison) -> list[list[str]]:
    """One row per setting: result, seeds, sizes, cost and learning rate."""
    sample = comparison.sample
    header = ["model", f"{sample['metric']['label'].lower()}, median (range)", "seeds", "parameters", "state",
              "training FLOPs", "processor time", "learning rate"]  # fmt: skip
    return [header, *(_row(setting) for setting in comparison.settings)]


def median_and_range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def format_values(values: Mapping[str, float], sign: str = "") -> str:
    """Names with their values, for a finding."""
    return ", ".join(f"{name} {value:{sign}.3f}" for name, value in values.items())


def parameter_span(comparison: Comparison) -> str:
    """From the smallest to the largest model shown."""
    counts = [parameters(setting) for setting in comparison.shown]
    return f"{min(counts):,} to {max(counts):,}"


def _row(setting: Setting) -> list[str]:
    rate = f"{setting.tuned('train.lr'):g} of {listed(setting.grid['train.lr'])}"
    if len(decays := setting.grid["train.weight_decay"]) > 1:
        rate += f", weight decay {setting.tuned('train.weight_decay'):g} of {listed(decays)}"
    if not setting.finished:
        return [setting.label, "none finished", f"0 of {len(setting.runs)}", "", "", "", "", rate]
    values, first = setting.values(test_of), setting.finished[0].record
    flops, seconds = (setting.median(lambda run, name=name: run.record["cost"][name])
                      for name in ("flops", "processor_seconds"))  # fmt: skip
    return [
        setting.label,
        median_and_range(values),
        f"{len(values)} of {len(setting.runs)}",
        f"{first['model']['parameters']:,}",
        bytes_text(first["model"]["state_bytes"]),
        f"{flops:.2g}".replace("e+", "e"),
        f"{seconds:.1f} s",
        rate,
    ]
