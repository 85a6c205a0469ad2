"""Selective copying needs dynamics that look at the input: fixed decays, gates and the delta rule under one budget."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import ClassVar

from matplotlib.axes import Axes

from experiments.report.comparison import Comparison
from experiments.report.figures import bytes_text
from experiments.studies import plots
from experiments.studies.study import Figure, Finding, Runs, Study, Table
from experiments.studies.sweep import Sweep
from experiments.util.plot_style import QUIET

EXPERIMENT = "results/selective_copying"
GRID = ("model=s4d,retention,gla,delta_net",)
KINDS = {"s4d": "fixed", "retention": "fixed", "gla": "gated", "delta_net": "delta rule"}


class SelectiveCopying(Study):
    name = "selective_copying"
    title = "Selective copying needs dynamics that look at the input"
    sweeps: ClassVar[Mapping[str, Sweep]] = {
        "recorded": Sweep("experiment=selective_copying seed=0,1,2 train.lr=3e-3,1e-2", GRID),
        "small": Sweep("experiment=selective_copying seed=0,1,2 train.lr=1e-2 train.steps=300", GRID),
        "large": Sweep(
            "experiment=selective_copying seed=0,1,2,3,4 train.lr=3e-4,1e-3,3e-3 task.length=4112 train.batch_size=64"
            " train.steps=40000 train.eval_every=1000 train.device=cuda",
            (*GRID, "model=mamba,mamba2,hyena,gated_delta_net,attention"),
        ),
    }
    history = ("validation_accuracy",)

    def figures(self, runs: Runs) -> Sequence[Figure]:
        comparison = runs.comparison(EXPERIMENT)
        return [
            Figure(
                "copying",
                "Left: accuracy on test, each at its learning rate by median validation accuracy among"
                f" {plots.grid_text(comparison)}; marks are seeds, strokes medians, the state's bytes beside the name."
                " Right: the same models on validation while they train, seeds thin, medians thick. Chance is dashed.",
                lambda axes: draw(axes, comparison),
                columns=2,
                size=(10.8, 3.8),
            )
        ]

    def tables(self, runs: Runs) -> Sequence[Table]:
        return [Table("Every model", plots.table(runs.comparison(EXPERIMENT)))]

    def findings(self, runs: Runs) -> Sequence[Finding]:
        best = medians(runs.comparison(EXPERIMENT))
        fixed = {name: value for name, value in best.items() if KINDS[name] == "fixed"}
        return [
            Finding(
                "fixed dynamics fall short",
                "Dynamics that do not look at the input do not solve it (Gu and Dao 2023, table 1: S4 18 %)",
                plots.format_values(fixed),
                max(fixed.values()) < 0.6,
            ),
            Finding(
                "gates above fixed dynamics",
                "Decays that look at the input do better (the same: S6 97 %)",
                plots.format_values({"gla": best["gla"], **fixed}),
                best["gla"] > max(fixed.values()) + 0.1,
            ),
            Finding(
                "the delta rule solves it",
                "The delta rule comes near 1 under the same budget (expected before the runs, without a source)",
                plots.format_values({"delta_net": best["delta_net"]}),
                best["delta_net"] > 0.95,
            ),
        ]


def medians(comparison: Comparison) -> dict[str, float]:
    return {plots.model_name(setting): plots.median_of(setting) for setting in comparison.shown}


def draw(panels: Sequence[Axes], comparison: Comparison) -> None:
    ordered = sorted(comparison.shown, key=plots.median_of, reverse=True)
    rows = [(f"{plots.model_name(setting)} ({KINDS[plots.model_name(setting)]}),"
             f" {bytes_text(plots.state_bytes(setting))}", plots.mixer_style(setting.pattern),
             setting.values(lambda run: run.result("test"))) for setting in ordered]  # fmt: skip
    plots.draw_rows(panels[0], rows)
    panels[0].set_xlim(-0.02, 1.03)
    panels[0].axvline(comparison.sample["metric"]["chance"], color=QUIET, linestyle=(0, (2, 2)), linewidth=1.2)
    panels[0].set_xlabel("Accuracy on test")
    draw_training(panels[1], comparison)


def draw_training(axes: Axes, comparison: Comparison) -> None:
    ends = []
    for setting in comparison.shown:
        style = plots.mixer_style(setting.pattern)
        courses = [{line["step"]: line["validation_accuracy"] for line in run.metrics} for run in setting.finished]
        for course in courses:
            axes.plot(list(course), list(course.values()), color=style["color"], alpha=0.35, linewidth=0.8)
        steps = sorted({step for course in courses for step in course})
        # A run that stopped early, at its target, stays there.
        middle = [
            statistics.median(course.get(step, list(course.values())[-1]) for course in courses) for step in steps
        ]
        axes.plot(steps, middle, markersize=5, **style)
        ends.append((plots.model_name(setting), style["color"], (steps[-1], middle[-1])))
    axes.set_xlim(left=0)
    plots.shares(axes)
    plots.mark_chance(axes, comparison.shown[0].finished[0])
    plots.label_lines(axes, ends)
    axes.set_xlabel("Training step")
    axes.set_ylabel("Accuracy on validation")
