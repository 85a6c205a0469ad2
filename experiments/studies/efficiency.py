"""Efficiency: quality against training FLOPs and processor time, and decoding memory against context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.report.comparison import Comparison, Setting
from experiments.report.figures import bytes_text, metric_label
from experiments.runs.recorded import RecordedRun
from experiments.studies import length, plots, recall_and_state
from experiments.studies.study import Figure, Finding, Runs, Study, Table
from experiments.studies.sweep import Sweep
from experiments.util.plot_style import QUIET

CONTEXTS = [2**power for power in range(6, 21)]
COSTS = {"flops": "Training FLOPs (logarithmic)", "processor_seconds": "Processor time of training (s, logarithmic)"}
RECALLED = 0.9
"""The accuracy that the table asks each mixer to reach."""


class Efficiency(Study):
    name = "efficiency"
    title = "Efficiency"
    sweeps: ClassVar[Mapping[str, Sweep]] = {}
    uses = (recall_and_state.RecallAndState.name, length.Length.name)

    def figures(self, runs: Runs) -> Sequence[Figure]:
        recall, text = recalled(runs), runs.comparison(length.EXPERIMENT)
        shared = (
            "Each line is a model in training, its median over seeds at each evaluation on the validation split,"
            " against what training had cost by then; each model at the learning rate that validation chose."
            " Grey: the best that any of them reaches at that cost."
        )
        return [
            Figure(
                "recall",
                f"Recall while training, against FLOPs (left) and processor time of one thread (right). {shared} Each"
                " mixer at its best state.",
                lambda axes: draw_courses(axes, recall, "validation_accuracy"),
                columns=2,
                size=(10.4, 4.2),
            ),
            Figure(
                "text",
                f"The same on text, less is better. {shared}",
                lambda axes: draw_courses(axes, text, "validation_bits_per_byte"),
                columns=2,
                size=(10.4, 4.2),
            ),
            Figure(
                "memory",
                "What a model carries from token to token in decoding, against the context: by the formulas that the"
                " test suite holds to the bytes of real states. The models of the text figure, two layers of width 64"
                " in float32.",
                lambda axes: draw_memory(axes[0], text),
                size=(7.2, 4.2),
            ),
        ]

    def tables(self, runs: Runs) -> Sequence[Table]:
        recall, text = recalled(runs), runs.comparison(length.EXPERIMENT)
        header = ["model", f"FLOPs to {RECALLED:.0%} recall", "processor time to that", "bytes of state"]
        rows = [
            [setting.label, *reached(setting), bytes_text(plots.state_bytes(setting))]
            for setting in sorted(recall.shown, key=lambda setting: cost_of(setting, "flops") or np.inf)
        ]
        few = CONTEXTS[::7]
        memory = [
            [setting.label, *(bytes_text(length.built(setting).state_bytes(context)) for context in few)]
            for setting in text.shown
        ]
        return [
            Table("Recall: median cost of reaching it, on validation", [header, *rows]),
            Table("State in decoding, by context", [["model", *(f"{context:,}" for context in few)], *memory]),
        ]

    def findings(self, runs: Runs) -> Sequence[Finding]:
        recall, text = recalled(runs), runs.comparison(length.EXPERIMENT)
        costs = {setting.label: cost_of(setting, "flops") for setting in recall.shown}
        seconds = {setting.label: cost_of(setting, "processor_seconds") for setting in recall.shown}
        models = {setting.label: length.built(setting) for setting in text.shown}
        grown = {name: model.state_bytes(CONTEXTS[-1]) / model.state_bytes(1024) for name, model in models.items()}
        fewest, fastest = (min((value, name) for name, value in each.items() if value) for each in (costs, seconds))
        return [
            Finding(
                "attention is cheapest at short lengths",
                "Sub-quadratic models pay off at long lengths; at 64 tokens attention learns recall at the least cost",
                f"fewest FLOPs: {fewest[1]}, {fewest[0]:.1e}; least processor time: {fastest[1]}, {fastest[0]:.1f} s",
                fewest[1].startswith("attention") and fastest[1].startswith("attention"),
            ),
            Finding(
                "only attention's state grows",
                "Decoding memory is constant for recurrent models and windows, and grows for attention",
                f"state at {CONTEXTS[-1]:,} over state at 1,024: "
                + ", ".join(f"{name} {ratio:,.0f}" for name, ratio in grown.items()),
                all((ratio > 1.01) == name.startswith("attention") for name, ratio in grown.items()),
            ),
        ]


def recalled(runs: Runs) -> Comparison:
    """The recall runs, each mixer at its best state."""
    whole = recall_and_state.chosen(runs)
    best = [max(settings, key=plots.median_of) for settings in plots.by_model(whole).values()]
    return Comparison(whole.name, best, whole.seeds, whole.remarks)


def course(run: RecordedRun, metric: str, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """The cost of training up to each evaluation, and the metric there; each step costs the same."""
    lines = [line for line in run.metrics if metric in line]
    each = run.record["cost"][cost] / run.record["cost"]["steps"]
    return np.array([line["step"] * each for line in lines]), np.array([line[metric] for line in lines])


def cost_of(setting: Setting, cost: str) -> float | None:
    """The median over seeds of what it took to recall enough; ``None`` where most seeds never do."""
    spent = []
    for run in setting.finished:
        costs, values = course(run, "validation_accuracy", cost)
        spent.append(costs[values >= RECALLED][0] if (values >= RECALLED).any() else np.inf)
    middle = float(np.median(spent))
    return middle if np.isfinite(middle) else None


def reached(setting: Setting) -> list[str]:
    flops, seconds = cost_of(setting, "flops"), cost_of(setting, "processor_seconds")
    if flops is None or seconds is None:
        return ["not reached", ""]
    return [f"{flops:.1e}".replace("e+", "e"), f"{seconds:.1f} s"]


def draw_courses(panels: Sequence[Axes], comparison: Comparison, metric: str) -> None:
    higher = comparison.sample["metric"]["higher_is_better"]
    for axes, (cost, label) in zip(panels, COSTS.items(), strict=True):
        ends, every = [], []
        for setting in comparison.shown:
            style = length.style_of(setting)
            costs, values = median_course(setting, metric, cost)
            axes.plot(costs, values, markersize=5, **style)
            ends.append((plots.model_name(setting), style["color"], (costs[-1], values[-1])))
            every += zip(costs, values, strict=True)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        if comparison.sample["metric"]["unit"] == "":
            plots.shares(axes)
            plots.mark_chance(axes, comparison.shown[0].finished[0], x=0.01)
        draw_frontier(axes, sorted(every), max if higher else min)
        plots.label_lines(axes, ends)
    panels[0].set_ylabel(f"{metric_label(comparison)} on validation")


def median_course(setting: Setting, metric: str, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """Medians over seeds at each evaluation. A seed that stopped early, at the target, stays where it was."""
    courses = [course(run, metric, cost) for run in setting.finished]
    longest = max(len(costs) for costs, _ in courses)
    each = np.median([costs[-1] / len(costs) for costs, _ in courses])
    values = [np.pad(values, (0, longest - len(values)), mode="edge") for _, values in courses]
    return each * np.arange(1, longest + 1), np.median(values, axis=0)


def draw_frontier(axes: Axes, points: Sequence[tuple[float, float]], better: Callable[..., Any]) -> None:
    values = [points[0][1]]
    for _, value in points[1:]:
        values.append(better(values[-1], value))
    axes.step([cost for cost, _ in points], values, where="post", color=QUIET, linewidth=5, alpha=0.25, zorder=1)
    axes.legend([Line2D([], [], color=QUIET, linewidth=5, alpha=0.25)], ["best at this cost"], fontsize=8,
                frameon=False, loc="upper left" if better is max else "lower left")  # fmt: skip


def draw_memory(axes: Axes, comparison: Comparison) -> None:
    ends = []
    for setting in comparison.shown:
        if "no_position" in setting.label:
            continue  # As much as attention.
        model, style = length.built(setting), length.style_of(setting)
        values = [model.state_bytes(context) for context in CONTEXTS]
        axes.plot(CONTEXTS, values, markersize=4, **style)
        ends.append((setting.label, style["color"]))
    plots.logarithmic(axes, CONTEXTS[::2], lambda value: f"{value:,.0f}")
    plots.logarithmic(axes, [2.0**power for power in range(14, 31, 4)], bytes_text, axis="y")
    axes.set_xlabel("Context (tokens, logarithmic)")
    axes.set_ylabel("State (bytes, logarithmic)")
    axes.tick_params(axis="x", labelsize=8)
    axes.legend([name for name, _ in ends], fontsize=8.5, frameon=False, loc="upper left")
