"""The learning rate decides: recall against learning rate, with one layer and with two."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import ClassVar

from matplotlib.axes import Axes

from experiments.report.figures import test_of
from experiments.runs.recorded import RecordedRun
from experiments.studies import plots
from experiments.studies.recall_and_state import HEADS
from experiments.studies.study import Figure, Finding, Runs, Study, Table
from experiments.studies.sweep import Sweep

GRID = (
    "model=attention",
    HEADS["delta_net"] + "2",
    HEADS["gla"] + "2",
)
SMALL = ("model=attention", HEADS["delta_net"] + "2")
GOOD = 0.9
"""A rate works for a model whose median accuracy is at least this share of the best that the model reaches."""

Course = dict[float, list[float]]
"""The test results of all seeds, by learning rate."""


class LearningRate(Study):
    name = "learning_rate"
    title = "The learning rate decides"
    sweeps: ClassVar[Mapping[str, Sweep]] = {
        "recorded": Sweep(
            "experiment=recall_and_state seed=0,1,2 train.lr=1e-3,3e-3,1e-2,3e-2,1e-1 model.depth=2,1", GRID
        ),
        "small": Sweep("experiment=recall_and_state seed=0,1,2 train.lr=1e-3,1e-2 model.depth=2,1", SMALL),
        "large": Sweep(
            "experiment=recall_and_state seed=0,1,2,3,4 train.lr=1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1 model.depth=2,1"
            " model.d_model=128 task.vocab_size=8192 task.length=256 task.pairs=64 train.batch_size=256"
            " train.steps=8000 train.eval_every=500 train.device=cuda",
            (*GRID, HEADS["gated_delta_net"] + "2", HEADS["retention"] + "2", "model=mamba2"),
        ),
    }

    def figures(self, runs: Runs) -> Sequence[Figure]:
        courses = by_depth(runs)
        caption = (
            "Recall on the test split against the peak learning rate, after 300 steps at most, with one layer and with"
            " two. Small marks are seeds, lines join medians, bars are ranges, crosses at the bottom are runs that"
            " diverged. Every rate of the grid is shown, so nothing is chosen here; chance is dashed."
        )
        return [Figure("rates", caption, lambda axes: draw(axes, courses, runs), columns=2, size=(10.4, 4.2))]

    def tables(self, runs: Runs) -> Sequence[Table]:
        rates = sorted({rate for models in by_depth(runs).values() for course in models.values() for rate in course})
        header = ["model", "layers", *(f"{rate:g}" for rate in rates)]
        rows = [[name, str(depth), *(cell(course.get(rate)) for rate in rates)]
                for depth, models in by_depth(runs).items() for name, course in models.items()]  # fmt: skip
        return [Table("Median (range) of the test accuracy, by learning rate", [header, *rows])]

    def findings(self, runs: Runs) -> Sequence[Finding]:
        courses = by_depth(runs)
        widths = {depth: {name: band(course) for name, course in models.items()} for depth, models in courses.items()}
        recurrent = {name: width for name, width in widths[2].items() if name != "attention"}
        deep, flat = courses[2]["attention"], courses[1]["attention"]
        worst = {name: spread(course) for name, course in courses[2].items()}
        return [
            Finding(
                "recurrent models have narrower bands",
                "Recurrent models learn recall in a narrow band of learning rates, attention in a wide one"
                " (Okpekpe and Orvieto 2025, arXiv 2508.19029)",
                "rates within a tenth of the best, two layers: "
                + ", ".join(f"{name} {width}" for name, width in widths[2].items()),
                max(recurrent.values()) < widths[2]["attention"],
            ),
            Finding(
                "the rate moves a model from chance to its best",
                "The rate alone decides whether a model seems able to recall (the same)",
                "lowest to highest median, two layers: "
                + ", ".join(f"{name} {low:.2f} to {high:.2f}" for name, (low, high) in worst.items()),
                any(high - low > 0.5 for low, high in worst.values()),
            ),
            Finding(
                "one layer of attention fails",
                "One layer of attention does not learn recall, two do (the same; there without a convolution)",
                f"attention, best median: one layer {max(map(statistics.median, flat.values())):.3f},"
                f" two {max(map(statistics.median, deep.values())):.3f}",
                max(map(statistics.median, flat.values())) < 0.5 < max(map(statistics.median, deep.values())),
            ),
        ]


def cell(values: Sequence[float] | None) -> str:
    return plots.median_and_range(values) if values else "-"


def studied(runs: Runs) -> list[RecordedRun]:
    return runs.by_study[LearningRate.name]


def by_depth(runs: Runs) -> dict[int, dict[str, Course]]:
    """For one layer and for two, each model's finished runs by learning rate."""
    found: dict[int, dict[str, Course]] = {1: {}, 2: {}}
    for run in studied(runs):
        if run.finished:
            course = found[run.config["model"]["depth"]].setdefault(run.config["model"]["name"], {})
            course.setdefault(run.config["train"]["lr"], []).append(test_of(run))
    return {depth: {name: dict(sorted(models[name].items())) for name in sorted(models)}
            for depth, models in found.items()}  # fmt: skip


def band(course: Course) -> int:
    """The number of rates that come near to the best."""
    middles = [statistics.median(values) for values in course.values()]
    return sum(middle >= GOOD * max(middles) for middle in middles)


def spread(course: Course) -> tuple[float, float]:
    middles = [statistics.median(values) for values in course.values()]
    return min(middles), max(middles)


def draw(panels: Sequence[Axes], courses: Mapping[int, Mapping[str, Course]], runs: Runs) -> None:
    rates = sorted({rate for models in courses.values() for course in models.values() for rate in course})
    for axes, (depth, models) in zip(panels, courses.items(), strict=True):
        plots.logarithmic(axes, rates, lambda value: f"{value:g}")
        axes.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
        plots.shares(axes)
        ends = []
        for name, course in models.items():
            style = plots.mixer_style(name)
            ends.append((name, style["color"], plots.draw_series(axes, list(course.items()), style)))
            failed = [run.config["train"]["lr"] for run in studied(runs) if not run.finished
                      and (run.config["model"]["name"], run.config["model"]["depth"]) == (name, depth)]  # fmt: skip
            plots.draw_failures(axes, failed, style)
        plots.label_lines(axes, ends)
        plots.mark_chance(axes, studied(runs)[0])
        axes.set_xlabel("Learning rate (logarithmic)")
        axes.set_title("One layer" if depth == 1 else "Two layers")
    panels[0].set_ylabel("Recall accuracy on test")
