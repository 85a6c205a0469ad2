"""The picture and the table of small states: recall and loss against bytes of state, by mixer and rounding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from experiments.report.figures import bytes_text
from experiments.report.statistics import Interval, mean_interval
from experiments.studies import plots
from experiments.studies.records import digest
from experiments.studies.small_states import FORMATS, WAYS, Line, read_records
from experiments.util.blocks import table
from experiments.util.plot_style import COLOURS, figure

FIGURE = "recall.png"
FULL = "float32"
HEADER = ("mixer", "tokens", "state", "bytes of state", "recall", "less float32's", "loss less float32's")
STYLES = dict(zip(WAYS, (("o", "-"), ("s", (0, (4, 2))), ("^", (0, (1, 1)))), strict=True))
"""Marker and line of each way to round."""


def scores(lines: Sequence[Line], mixer: str, length: int, name: str, of: str = "recall") -> np.ndarray:
    """``[seeds, sequences]`` of one mixer in one format at one length, by run; none where nothing was measured."""
    own = sorted((line for line in lines if (line.mixer, line.length, line.format) == (mixer, length, name)), key=_run)
    return np.array([getattr(line, of) for line in own], dtype=float)


def _run(line: Line) -> str:
    return line.run


def less(lines: Sequence[Line], mixer: str, length: int, name: str, of: str = "recall") -> Interval:
    """The difference to float32 of the same runs on the same sequences, with its 95 % interval over both."""
    return mean_interval(scores(lines, mixer, length, name, of) - scores(lines, mixer, length, FULL, of))


def complete(lines: Sequence[Line]) -> list[Line]:
    """The lines of mixers and lengths that have all their runs in float32 and the same runs in each other format."""
    runs: dict[tuple[str, int, str], set[str]] = {}
    for line in lines:
        runs.setdefault((line.mixer, line.length, line.format), set()).add(line.run)
    return [
        line for line in lines
        if runs.get((line.mixer, line.length, FULL)) == runs[line.mixer, line.length, line.format]
    ]  # fmt: skip


def small_states_table(folder: Path) -> str:
    """A row for each mixer, length and format on record."""
    lines = complete(read_records(folder))
    rows = []
    for mixer, length in sorted({(line.mixer, line.length) for line in lines}):
        for name in FORMATS:
            own = [line for line in lines if (line.mixer, line.length, line.format) == (mixer, length, name)]
            if own:
                recall = mean_interval(scores(lines, mixer, length, name))
                changes = ("", "") if name == FULL else (
                    _signed(less(lines, mixer, length, name)), _signed(less(lines, mixer, length, name, "loss")))  # fmt: skip
                rows.append([mixer, f"{length:,}", name, f"{own[0].bytes:,}", f"{recall.estimate:.3f}", *changes])
    return table(HEADER, rows, align="--:", left=1) if rows else ""


def _signed(found: Interval) -> str:
    return f"{found.estimate:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def draw(folder: Path) -> Path:
    """Write the picture of the longest sequences on record: a column a mixer, recall above and loss below."""
    lines = complete(read_records(folder))
    length = max(line.length for line in lines)
    mixers = sorted({line.mixer for line in lines if line.length == length})
    path = folder / FIGURE
    size = (3.3 * len(mixers), 6.4)
    with figure([path], columns=len(mixers), rows=2, size=size, source=digest(folder), sharey="row") as (drawing, axes):
        drawing.suptitle(f"Recall over {length:,} tokens, read one by one, against the bytes of a state in fewer bits")
        for column, mixer in enumerate(mixers):
            for row, of in enumerate(("recall", "loss")):
                _panel(axes[row * len(mixers) + column], lines, mixer, length, of)
            axes[column].set_title(mixer)
            axes[len(mixers) + column].set_xlabel("Bytes of state (logarithmic)")
        axes[0].set_ylabel("Recall")
        axes[len(mixers)].set_ylabel("Loss of answers (nats)")
        axes[0].legend(loc="lower right", fontsize=8)
    return path


def _panel(axes: Axes, lines: Sequence[Line], mixer: str, length: int, of: str) -> None:
    own = {line.format: line.bytes for line in lines if (line.mixer, line.length) == (mixer, length)}
    for (way, (marker, dashes)), colour in zip(STYLES.items(), COLOURS.values(), strict=False):
        names = [name for name in own if name.endswith(f", {way}")]
        points = sorted((own[name], mean_interval(scores(lines, mixer, length, name, of))) for name in names)
        if points:
            x, y = [size for size, _ in points], [found.estimate for _, found in points]
            reach = [
                [found.estimate - found.low for _, found in points],
                [found.high - found.estimate for _, found in points],
            ]
            axes.errorbar(
                x, y, reach, marker=marker, linestyle=dashes, color=colour, label=way, elinewidth=1, markersize=5
            )
    full = mean_interval(scores(lines, mixer, length, FULL, of))
    axes.axhline(full.estimate, color="#999999", linewidth=1, zorder=1)
    axes.plot([own[FULL]], [full.estimate], marker="D", color="#444444", linestyle="none", label="float32")
    plots.byte_axis(axes, list(own.values()))
    for name, size in own.items():
        if name.endswith(", nearest"):
            axes.annotate(
                name.partition(",")[0], (size, 0.02), xycoords=("data", "axes fraction"), fontsize=7, ha="center"
            )


def summary(folder: Path) -> str:
    """What is on record, in a line a mixer, for a terminal."""
    lines = complete(read_records(folder))
    said = []
    for mixer, length in sorted({(line.mixer, line.length) for line in lines}):
        for name in FORMATS:
            own = [line for line in lines if (line.mixer, line.length, line.format) == (mixer, length, name)]
            if own:
                recall = mean_interval(scores(lines, mixer, length, name)).estimate
                said.append(f"{mixer:20} {length:6} {name:24} {bytes_text(own[0].bytes):>10} {recall:.3f}")
    return "\n".join(said)
