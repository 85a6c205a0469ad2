"""Draws and tells what recorded runs show: ``python -m experiments.report runs/demo``

Reads run folders alone, offline, and writes ``report/`` beside them: ``index.md``, ``results.csv`` and the plots.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments import figures
from experiments.errors import RunnerError, writing
from experiments.files import write_atomic
from experiments.page import table_rows, write_page
from experiments.reading import Comparison, RecordedRun, compare, read_runs
from experiments.style import figure

FORMATS = ("png", "svg")
TERMINAL_HEADER = ("Seeds", "Parameters", "FLOPs", "State", "Tokens/s", "LR")
"""Short names of the table's later columns; ``index.md`` has the long ones."""


def report(root: Path) -> tuple[Path, list[Comparison], list[str]]:
    """Write the report of all runs below ``root``; returns its folder, what it compares and what could not be read.

    Raises:
        RunnerError: there is no run, none is finished, or the report cannot be written.
    """
    if not root.is_dir():
        raise RunnerError(f"{root} is no folder; give one that holds runs, such as runs/mqar")
    runs, problems = read_runs(root)
    if not runs:
        told = "".join(f"\n    {problem}" for problem in problems)
        raise RunnerError(f"{root} holds no recorded run (no folder with a config.json){told}")
    comparisons = compare(runs)
    target = root / "report"
    with writing(target):
        target.mkdir(exist_ok=True)
        pictures = {comparison.name: draw(comparison, target) for comparison in comparisons if comparison.shown}
        if len(pictures) > 1:
            draw_overview([comparison for comparison in comparisons if comparison.shown], target)
        write_atomic(target / "results.csv", results_csv(runs))
        write_page(target / "index.md", root, comparisons, pictures, problems)
    if not pictures:
        told = [*(remark for comparison in comparisons for remark in comparison.remarks), *problems]
        remarks = "".join(f"\n    {line}" for line in told)
        raise RunnerError(f"no run below {root} is finished yet, so there is nothing to draw{remarks}")
    return target, comparisons, problems


def draw(comparison: Comparison, target: Path) -> list[tuple[str, str]]:
    """All plots of a comparison; the names of their files without ending, and what each shows."""
    stem = comparison.name.replace("/", "-")
    rows = len(comparison.shown)
    drawn = []

    def paths(kind: str, shows: str) -> list[Path]:
        drawn.append((f"{stem}-{kind}", shows))
        return [target / f"{stem}-{kind}.{ending}" for ending in FORMATS]

    title = comparison.sample["task"]["title"]
    if any("curve" in run.record["results"] for variant in comparison.shown for run in variant.finished):
        with figure(paths("position", "the metric along the position"), size=(7.2, 4.2)) as (_, (axes,)):
            figures.draw_curve(axes, comparison)
            axes.set_title(title)
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


def draw_overview(comparisons: list[Comparison], target: Path) -> None:
    """The comparisons side by side, each by its most telling plot."""
    paths = [target / f"overview.{ending}" for ending in FORMATS]
    with figure(paths, columns=len(comparisons), size=(6.0 * len(comparisons), 3.9)) as (_, panels):
        for axes, comparison in zip(panels, comparisons, strict=True):
            has_curve = "curve" in comparison.shown[0].finished[0].record["results"]
            (figures.draw_curve if has_curve else figures.draw_ranking)(axes, comparison)
            axes.set_title(comparison.sample["task"]["title"])


def results_csv(runs: list[RecordedRun]) -> str:
    """One line a run, failed and unfinished ones too."""
    columns = ["experiment", "run", "model", "pattern", "seed", "lr", "weight_decay", "status", "reason", "metric",
               "test", "validation", "steps", "parameters", "flops", "state_bytes", "state_length",
               "tokens_per_second", "train_seconds", "peak_memory_bytes", "data_hash", "commit"]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for run in runs:
        part = {name: run.record.get(name, {}) for name in ("cost", "model", "results", "data", "code", "metric")}
        writer.writerow(
            {
                "experiment": run.config["experiment"],
                "run": run.path.name,
                "model": run.config["model"]["name"],
                "pattern": run.config["model"]["pattern"],
                "seed": run.config["seed"],
                "lr": run.config["train"]["lr"],
                "weight_decay": run.config["train"].get("weight_decay"),
                "status": run.status,
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


def show(comparisons: list[Comparison], problems: list[str], target: Path) -> None:
    """The tables, in the terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=110)
    for comparison in comparisons:
        if comparison.shown:
            _, *rows = table_rows(comparison)
            header = ("Model", comparison.sample["metric"]["label"], *TERMINAL_HEADER)
            title = f"{comparison.sample['task']['title']} ({comparison.name})"
            table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
            for position, name in enumerate(header):
                table.add_column(name, justify="left" if position == 0 else "right", no_wrap=position != 1)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for remark in comparison.remarks:
            console.print(f"{comparison.name}: {remark}", markup=False)
    for problem in problems:
        console.print(f"not read: {problem}", markup=False, soft_wrap=True)
    console.print(f"The plots and the whole report: {target / 'index.md'}", markup=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw and tell what recorded runs show.")
    parser.add_argument("root", type=Path, help="a folder that holds runs at any depth, such as runs/mqar")
    try:
        target, comparisons, problems = report(parser.parse_args().root)
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(comparisons, problems, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
