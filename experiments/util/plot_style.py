"""The style of plots: one palette and one set of sizes. Colours are Okabe and Ito's, safe for the colour-blind."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.util.files import write_atomic
from experiments.util.patterns import without_options
from seqarch.layers import FAMILIES

COLOURS = {
    "attention": "#0072B2",
    "sparse attention": "#56B4E9",
    "linear attention": "#E69F00",
    "state space": "#009E73",
    "delta rule": "#CC79A7",
    "recurrence": "#882255",
    "convolution": "#332288",
    "hybrid": "#D55E00",
}
RESERVE = ("#999933", "#8C564B", "#5E7C8A")
"""For mixers of no family, one each."""

DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
MARKERS = ("", "o", "s", "^", "D")
"""For lines of one colour when the dashes are used up."""

INK, QUIET = "#222222", "#767676"

RULES: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "savefig.dpi": 200,
    "svg.hashsalt": "seqarch",  # The same runs give the same file, byte for byte.
}


@contextmanager
def figure(
    paths: list[Path],
    columns: int = 1,
    rows: int = 1,
    size: tuple[float, float] = (6.4, 4.0),
    source: str | None = None,
    **options,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with its axes, saved to each path (the ending chooses the format) at the end of the block.

    ``source``, such as a hash of the data that is drawn, is kept in a PNG's text.
    """
    with plt.rc_context(RULES):
        drawing, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
        yield drawing, list(axes.flat)
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None, "Source": source}
            content = io.BytesIO()
            drawing.savefig(content, format=path.suffix[1:], metadata=metadata)
            write_atomic(path, content.getvalue(), durable=False)
        plt.close(drawing)


def family(pattern: str) -> str:
    """The family of a pattern's mixers; more than one mixer makes a hybrid."""
    mixers = pattern_mixers(pattern)
    if len(mixers) > 1:
        return "hybrid"
    return next((name for name, members in FAMILIES.items() if mixers <= set(members)), "other")


def colours(patterns: Iterable[str]) -> dict[str, str]:
    """The colour of each pattern of a report: that of its family, or of its own from the reserve."""
    kinds = {pattern: family(pattern) for pattern in patterns}
    unlisted = sorted(
        {mixer for pattern, kind in kinds.items() if kind == "other" for mixer in pattern_mixers(pattern)}
    )
    reserve = {mixer: RESERVE[index % len(RESERVE)] for index, mixer in enumerate(unlisted)}
    return {
        pattern: COLOURS[kind] if kind in COLOURS else reserve[min(pattern_mixers(pattern))]
        for pattern, kind in kinds.items()
    }


def pattern_mixers(pattern: str) -> set[str]:
    without_channels = re.sub(r"/\s*\w+", "", without_options(pattern))
    return set(re.findall(r"[A-Za-z_]\w*", without_channels))


def pattern_channels(pattern: str) -> set[str]:
    """The channel mixers that a pattern names."""
    return set(re.findall(r"/\s*(\w+)", without_options(pattern)))


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least ``gap`` apart and within bounds as far as there is room.

    Labels at the ends of lines would overlap where lines end close together.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [min(max(wanted[i], low), high) for i in order]
    for _ in range(200):
        moved = False
        for i in range(len(placed) - 1):
            short = gap - (placed[i + 1] - placed[i])
            if short > 1e-9:
                placed[i] -= short / 2
                placed[i + 1] += short / 2
                moved = True
        if not moved:
            break
    most, least = high, low
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], most)
        most = placed[i] - gap
    for i in range(len(placed)):
        placed[i] = max(placed[i], least)
        least = placed[i] + gap
    result = [0.0] * len(wanted)
    for i, value in zip(order, placed, strict=True):
        result[i] = value
    return result
