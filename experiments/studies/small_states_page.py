"""The picture and the table of small states: recall and loss against bytes of state, by mixer and rounding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from experiments.report.statistics import Interval, mean_interval
from experiments.studies import plots
from experiments.studies.records import digest
from experiments.studies.small_states import FORMATS, Line, read_records
from experiments.util.blocks import table
from experiments.util.plot_style import COLOURS, INK, QUIET, figure

FIGURE = "recall.png"
FULL = "float32"
HEADER = ("mixer", "tokens", "state", "bytes", "recall", "recall less float32's", "loss less float32's")
STYLES = {
    "nearest": {"marker": "o", "linestyle": "-", "color": COLOURS["attention"]},
    "stochastic": {"marker": "s", "linestyle": (0, (4, 2)), "color": COLOURS["delta rule"]},
    "error feedback": {"marker": "^", "linestyle": (0, (1, 1)), "color": COLOURS["state space"]},
}
"""Of each way to round."""

MEASURES = {"recall": "Recall less float32's", "loss": "Loss of answers less float32's (nats)"}


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
    """The lines of formats with the same runs as float32 has, two at least: one says nothing of how seeds differ."""
    runs: dict[tuple[str, int, str], set[str]] = {}
    for line in lines:
        runs.setdefault((line.mixer, line.length, line.format), set()).add(line.run)
    full = {key[:2]: own for key, own in runs.items() if key[2] == FULL and len(own) > 1}
    return [
        line for line in lines
        if runs[line.mixer, line.length, line.format] == full.get((line.mixer, line.length))
    ]  # fmt: skip


def small_states_table(folder: Path) -> str:
    """A row for each mixer, length and format on record."""
    lines = complete(read_records(folder))
    found = [_row(lines, *key, name) for key in _cases(lines) for name in FORMATS]
    return table(HEADER, [row for row in found if row])


def _cases(lines: Sequence[Line]) -> list[tuple[str, int]]:
    """Each mixer with each of its lengths."""
    return sorted({(line.mixer, line.length) for line in lines})


def _row(lines: Sequence[Line], mixer: str, length: int, name: str) -> list[str]:
    """The row of one format; empty where it was not measured."""
    size = sizes(lines, mixer, length).get(name)
    if size is None:
        return []
    recall = mean_interval(scores(lines, mixer, length, name)).estimate
    changes = [] if name == FULL else [less(lines, mixer, length, name, of) for of in ("recall", "loss")]
    return [mixer, f"{length:,}", name, f"{size:,}", f"{recall:.3f}", *(map(_signed, changes) if changes else ("", ""))]


def sizes(lines: Sequence[Line], mixer: str, length: int) -> dict[str, int]:
    """The bytes of a state in each format that was measured."""
    return {line.format: line.bytes for line in lines if (line.mixer, line.length) == (mixer, length)}


def _signed(found: Interval) -> str:
    return f"{found.estimate:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def draw(folder: Path) -> Path | None:
    """Write the picture of the longest sequences on record, a column a mixer: what recall and loss lose by each format.

    Nothing is drawn where no mixer has two runs.
    """
    lines = complete(read_records(folder))
    if not lines:
        return None
    length = max(line.length for line in lines)
    mixers = sorted({line.mixer for line in lines if line.length == length})
    path, size = folder / FIGURE, (3.3 * len(mixers), 6.6)
    with figure([path], columns=len(mixers), rows=2, size=size, source=digest(folder), sharey="row") as (drawing, axes):
        drawing.suptitle(f"{length:,} tokens read one by one, by the bytes of a state")
        for column, mixer in enumerate(mixers):
            for row, of in enumerate(MEASURES):
                _panel(axes[row * len(mixers) + column], lines, mixer, length, of)
            full = scores(lines, mixer, length, FULL).mean()
            axes[column].set_title(f"{mixer}\nrecalls {full:.1%} in float32")
            axes[len(mixers) + column].set_xlabel("Bytes of state (logarithmic)")
        for row, said in enumerate(MEASURES.values()):
            axes[row * len(mixers)].set_ylabel(said)
        axes[len(mixers)].legend(loc="upper right", fontsize=8)
    return path


def _panel(axes: Axes, lines: Sequence[Line], mixer: str, length: int, of: str) -> None:
    own = sizes(lines, mixer, length)
    for way, style in STYLES.items():
        named = sorted((own[name], name) for name in own if name.endswith(f", {way}"))
        found = [less(lines, mixer, length, name, of) for _, name in named]
        if found:
            x, y = [size for size, _ in named], [each.estimate for each in found]
            reach = [[each.estimate - each.low for each in found], [each.high - each.estimate for each in found]]
            axes.errorbar(x, y, reach, label=way, markersize=5, elinewidth=1, **style)
    axes.axhline(0, color=QUIET, linewidth=1, zorder=1)
    axes.plot([own[FULL]], [0], marker="D", color=INK, linestyle="none", label=FULL)
    plots.byte_axis(axes, list(own.values()))
    for name, size in own.items():
        if name.endswith(", nearest"):
            place = {"xycoords": ("data", "axes fraction"), "fontsize": 7, "ha": "center"}
            axes.annotate(name.partition(",")[0], (size, 0.02), **place)
