"""Writes the report on recorded runs: its page, its table of runs, its plots and its explorer."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from experiments.report import explorer, figures, maps
from experiments.report.checks import comparable_runs
from experiments.report.comparison import Comparison, compare
from experiments.report.explorer_records import add_runs
from experiments.report.explorer_table import Records
from experiments.report.page import write_page
from experiments.runs.recorded import RecordedRun
from experiments.util import owned
from experiments.util.errors import RunnerError, writing
from experiments.util.files import write_atomic
from experiments.util.plot_style import figure

PLOT_FORMATS = ("png", "svg")

OVERVIEW_ACROSS = 4
"""Comparisons in a row of the overview."""

MAPS_ACROSS = 5
"""Models in a row of maps."""


def report(root: Path) -> tuple[Path, list[Comparison], list[str]]:
    """Write the report of all runs below ``root``; returns its folder, what it compares and what could not be read.

    Raises:
        RunnerError: there is no run, none is finished, or the report cannot be written, or would be among the files of
            somebody else.
    """
    runs, problems = comparable_runs(root)
    if not runs:
        details = "".join(f"\n    {problem}" for problem in problems)
        raise RunnerError(f"{root} holds no recorded run (no folder with a config.json){details}")
    comparisons = compare(runs)
    target = root / "report"
    owned.settle(target, "report", _is_report)
    with writing(target):
        plots = {comparison.name: draw(comparison, target) for comparison in comparisons if comparison.shown}
        if len(plots) > 1:
            draw_overview([comparison for comparison in comparisons if comparison.shown], target)
        write_atomic(target / "results.csv", results_csv(runs))
        explored = Records(sources=[str(root)])
        add_runs(runs, problems, explored)
        explorer.write_page(explored, target / explorer.FILE, f"seqarch report {root}")
        write_page(target / "index.md", root, comparisons, plots, problems)
    if not plots:
        lines = [*(remark for comparison in comparisons for remark in comparison.remarks), *problems]
        remarks = "".join(f"\n    {line}" for line in lines)
        raise RunnerError(f"no run below {root} is finished yet, so there is nothing to draw{remarks}")
    return target, comparisons, problems


def _is_report(folder: Path) -> bool:
    """Whether an index without a marker, as reports had before, says how it was made."""
    return owned.mentions(folder / "index.md", "python -m experiments.report")


def draw(comparison: Comparison, target: Path) -> list[tuple[str, str]]:
    """All plots of a comparison; the names of their files without ending, and what each shows."""
    rows = len(comparison.shown)
    drawn = []

    def paths(kind: str, shows: str) -> list[Path]:
        drawn.append((f"{comparison.stem}-{kind}", shows))
        return [target / f"{comparison.stem}-{kind}.{ending}" for ending in PLOT_FORMATS]

    title = comparison.title
    if curves := figures.curves(comparison):
        along = curves[0][1][0]["x_label"].lower()
        with figure(paths("position", f"the metric along the {along}"), size=(7.2, 4.2)) as (_, (axes,)):
            figures.draw_curve(axes, comparison)
            axes.set_title(title)
    if mapped := maps.maps(comparison):
        _draw_maps(
            paths("depth", "the metric by depth in the text and by its length, grey where nothing was asked"),
            comparison,
            len(mapped),
        )
    ranking = paths("ranking", "each model's seeds, median and range")
    with figure(ranking, size=(7.2, 1.6 + 0.42 * rows)) as (_, (axes,)):
        figures.draw_ranking(axes, comparison)
        axes.set_title(title)
    across = min(rows, 5)
    down = -(-rows // across)
    size = (2.2 * across + 0.8, 2.3 * down + 0.4)
    training = paths("training", "the course of training")
    with figure(training, across, down, size, sharex=True, sharey=True) as (drawing, panels):
        for panel in panels[rows:]:
            panel.remove()
        figures.draw_training(panels[:rows], comparison)
        drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    with figure(paths("state", "quality against the state's size"), size=(7.2, 4.2)) as (_, (axes,)):
        figures.draw_cost(axes, comparison)
        axes.set_title(title)
    return drawn


def _draw_maps(paths: list[Path], comparison: Comparison, count: int) -> None:
    """A row of maps, or several."""
    down = -(-count // MAPS_ACROSS)
    across = -(-count // down)
    size = (2.0 * across + 1.6, 1.9 * down + 0.9)
    with figure(paths, across, down, size, sharex=True, sharey=True) as (drawing, panels):
        for panel in panels[count:]:
            panel.remove()
        maps.draw_maps(drawing, panels[:count], comparison)
        drawing.suptitle(comparison.title, x=0.01, ha="left", fontsize=11, fontweight="bold")


def draw_overview(comparisons: list[Comparison], target: Path) -> None:
    """The comparisons side by side, each by its main plot."""
    paths = [target / f"overview.{ending}" for ending in PLOT_FORMATS]
    across = min(len(comparisons), OVERVIEW_ACROSS)
    down = -(-len(comparisons) // across)
    with figure(paths, across, down, size=(5.4 * across, 3.9 * down)) as (_, panels):
        for panel in panels[len(comparisons) :]:
            panel.remove()
        for axes, comparison in zip(panels, comparisons, strict=False):
            (figures.draw_curve if figures.curves(comparison) else figures.draw_ranking)(axes, comparison)
            axes.set_title(comparison.title)


def results_csv(runs: list[RecordedRun]) -> str:
    """One line per run, failed and unfinished ones too."""
    columns = ["experiment", "task", "run", "model", "pattern", "seed", "lr", "weight_decay", "status", "reason",
               "metric", "test", "validation", "steps", "parameters", "flops", "state_bytes", "state_length",
               "tokens_per_second", "train_seconds", "peak_memory_bytes", "data_hash", "commit"]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for run in runs:
        part = {name: run.record.get(name, {}) for name in ("cost", "model", "results", "data", "code", "metric")}
        writer.writerow(
            {
                "experiment": run.config["experiment"],
                "task": run.config["task"].get("name"),
                "run": run.name,
                "model": run.config["model"]["name"],
                "pattern": run.config["model"]["pattern"],
                "seed": run.config["seed"],
                "lr": run.config["train"]["lr"],
                "weight_decay": run.config["train"].get("weight_decay"),
                "status": run.recorded_status,
                "reason": run.record.get("reason"),
                "metric": part["metric"].get("name"),
                "data_hash": part["data"].get("hash"),
                "commit": part["code"].get("commit"),
                **{name: part["results"].get(name) for name in ("test", "validation")},
                **{name: part["model"].get(name) for name in ("parameters", "state_bytes", "state_length")},
                **{key: part["cost"].get(key) for key in columns if key in part["cost"]},
            }
        )
    return text.getvalue()
