"""The picture of ``experiments.bench decode``: tokens per second against context, a line an implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.util.plot_style import COLOURS, DASHES, QUIET, RESERVE, Axes, figure

PALETTE = (*COLOURS.values(), *RESERVE)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a model, of one row, with the ceiling: its bytes read once at the memory's rate."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    implementations = list(dict.fromkeys(row["implementation"] for row in rows))
    with figure([path], columns=len(names), size=(3.8 * len(names), 3.8)) as (drawing, panels):
        drawing.suptitle("Tokens decoded per second after a context, one row, equal weights in each panel", fontsize=11)
        for axes, name in zip(panels, names, strict=True):
            own = [row for row in rows if row["model"] == name and row["rows"] == min(r["rows"] for r in rows)]
            _panel(axes, name, own, dict(zip(implementations, PALETTE, strict=False)))


def _panel(axes: Axes, name: str, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for implementation in dict.fromkeys(row["implementation"] for row in rows):
        own = sorted((r for r in rows if r["implementation"] == implementation), key=lambda row: row["context"])
        x, y = [row["context"] for row in own], [row["tokens_per_second"] for row in own]
        axes.plot(x, y, marker="o", markersize=4, color=colours[implementation], label=implementation)
    ceiling = {row["context"]: row["tokens_per_second"] / row["rows"] / row["share"] for row in rows}
    x = sorted(ceiling)
    axes.plot(x, [ceiling[context] for context in x], color=QUIET, linestyle=DASHES[2], label="ceiling")
    axes.set_xticks(x, [str(context) if context < 1024 else f"{context // 1024}k" for context in x])
    axes.set_xticks([], minor=True)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("Tokens before")
    axes.set_ylabel("Tokens per second")
    axes.legend(fontsize=7)
