"""The picture and the table of coordinate checks: how fast changes grow with the width, by mixer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from experiments.studies.coordinate_check import KINDS, Line, exponents, read_records
from experiments.studies.plots import legend_below
from experiments.studies.records import digest
from experiments.util.blocks import table
from experiments.util.plot_style import COLOURS, QUIET, figure

FIGURE = "coordinates.png"
OUTPUTS = {"mixer": "what mixers give", "channel mixer": "what channel mixers give", "logits": "logits"}
STYLES: dict[str, dict[str, Any]] = {
    "standard": {"marker": "o", "color": COLOURS["hybrid"], "label": "standard: one rate for all"},
    "mup": {"marker": "D", "color": COLOURS["attention"], "label": "muP"},
}


def coordinate_check_table(folder: Path) -> str:
    """A row for each model on record: the exponents of each output, without muP and with it."""
    found = exponents(lines := read_records(folder))
    header = ["model", *(f"{OUTPUTS[name]}, {kind}" for name in OUTPUTS for kind in KINDS)]
    rows = [
        [model, *(_shown(found, model, kind, name) for name in OUTPUTS for kind in KINDS)] for model in models(lines)
    ]
    return table(header, rows)


def _shown(found: dict[tuple[str, str, str], float], model: str, kind: str, name: str) -> str:
    return f"{found[model, kind, name]:+.2f}" if (model, kind, name) in found else ""


def models(lines: list[Line]) -> list[str]:
    """Those on record, in alphabetical order."""
    return sorted({line.model for line in lines})


def draw(folder: Path) -> Path | None:
    """Write the picture, a panel an output and a line a model; none where no model was measured at three widths."""
    lines = read_records(folder)
    found = exponents(lines)
    if not found:
        return None
    names = [model for model in models(lines) if any(key[0] == model for key in found)]
    path, size = folder / FIGURE, (11.4, 1.6 + 0.22 * len(names))
    with figure([path], columns=len(OUTPUTS), size=size, source=digest(folder), sharey=True) as (drawing, panels):
        widths = sorted({line.width for line in lines})
        drawing.suptitle(f"Growth of changes with the width, {widths[0]} to {widths[-1]}: power of the width")
        for axes, (name, title) in zip(panels, OUTPUTS.items(), strict=True):
            _panel(axes, names, found, name)
            axes.set_title(title)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        keys, said = panels[0].get_legend_handles_labels()
        legend_below(panels, keys, said)
    return path


def _panel(axes: Axes, names: list[str], found: dict[tuple[str, str, str], float], name: str) -> None:
    for kind, style in STYLES.items():
        points = [(found[key], row) for row, model in enumerate(names) if (key := (model, kind, name)) in found]
        axes.plot([x for x, _ in points], [y for _, y in points], linestyle="none", markersize=5, **style)
    axes.axvline(0, color=QUIET, linewidth=1, zorder=1)
