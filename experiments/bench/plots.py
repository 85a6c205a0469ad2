"""The plot of a benchmark: time against length, a line per implementation, and below them the least possible."""

from __future__ import annotations

import math
from pathlib import Path

from experiments.bench.benchmark import AUTO
from experiments.bench.benchmarks import BENCHMARKS
from experiments.bench.record import Record, Row
from experiments.bench.sizes import SETUPS
from experiments.util.plot_style import COLOURS, DASHES, QUIET, RESERVE, Axes, figure, spread
from seqarch.ops import OPS

PALETTE = (*COLOURS.values(), *RESERVE)
OURS = {"seqarch", *(name for op in OPS.values() for name in op.backends)}


def draw(record: Record, folder: Path) -> Path | None:
    """Write ``BENCHMARK.png``, a panel per mode; nothing where there is one length alone."""
    modes = list(dict.fromkeys(row.mode for row in record.rows))
    lengths = sorted({row.length for row in record.rows})
    if len(lengths) < 2:
        return None
    path = folder / f"{record.file}.png"
    with figure([path], columns=len(modes), size=(6.4 * len(modes), 4.2)) as (drawing, panels):
        drawing.suptitle(f"{record.benchmark}, {record.dtype}: {record.title}", fontsize=11)
        for axes, mode in zip(panels, modes, strict=True):
            _panel(axes, mode, [row for row in record.rows if row.mode == mode], lengths, _line_styles(record))
    return path


def _panel(axes: Axes, mode: str, rows: list[Row], lengths: list[int], styles: dict[str, dict]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends = []
    for name in dict.fromkeys(row.implementation for row in rows):
        own = [row for row in rows if row.implementation == name]
        x, style = [row.length for row in own], styles[name]
        axes.plot(x, [row.median_ms for row in own], **style)
        low, high = [row.quartile1_ms for row in own], [row.quartile3_ms for row in own]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        ends.append((name, style["color"], x[-1], own[-1].median_ms))
    least = {row.length: row.share * row.median_ms for row in rows}
    axes.plot(list(least), list(least.values()), color=QUIET, linestyle=(0, (1, 1)), linewidth=1.4)
    ends.append(("ceiling", QUIET, *max(least.items())))
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    axes.set_xticks(lengths, [str(length) if length < 1024 else f"{length // 1024}k" for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_title(mode)
    axes.set_xlabel("Tokens")
    axes.set_ylabel("Time of a call (ms)")
    _label(axes, ends)


def _label(axes: Axes, ends: list[tuple[str, str, int, float]]) -> None:
    """Names right of the panel at the height where their lines end, moved apart where these are close."""
    low, high = (math.log10(bound) for bound in axes.get_ylim())
    wanted = [math.log10(y) for *_, y in ends]
    heights = spread(wanted, 0.055 * (high - low), low, high)
    for (name, colour, x, y), height in zip(ends, heights, strict=True):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkA": 0, "shrinkB": 1}
        axes.annotate(name, (x, y), xytext=(1.03, (height - low) / (high - low)), textcoords="axes fraction",
                      color=colour, fontsize=9, va="center", annotation_clip=False, arrowprops=leader)  # fmt: skip


def _line_styles(record: Record) -> dict[str, dict]:
    """By implementation: ours are whole lines, the others broken ones; a colour each, the same in every panel."""
    names = [name for name in BENCHMARKS[record.benchmark].implementations(SETUPS[record.device]) if name != AUTO]
    return {
        name: {"color": PALETTE[index % len(PALETTE)], "linestyle": DASHES[0 if name in OURS else 1], "marker": "o",
               "markersize": 4}
        for index, name in enumerate(names)
    }  # fmt: skip
