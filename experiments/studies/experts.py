"""Mixtures of experts: quality at equal active parameters, loads over time, what each balancing method costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from experiments.report.comparison import Comparison, Setting
from experiments.report.figures import test_of
from experiments.runs.recorded import RecordedRun
from experiments.studies import plots
from experiments.studies.study import Figure, Finding, Runs, Study, Table
from experiments.studies.sweep import Sweep
from experiments.util.plot_style import COLOURS, INK, QUIET
from seqarch.layers import build_channel_mixer

MOE = "model.channels.moe."
UNBALANCED = f"{MOE}load_balance_weight=0 {MOE}router_z_weight=0"
METHODS = {
    "dense": "model.channel=swiglu",
    "no_balancing": UNBALANCED,
    "loss": f"{MOE}load_balance_weight=0.01 {MOE}router_z_weight=0",
    "bias": f"{UNBALANCED} {MOE}expert_bias=true {MOE}bias_rate=0.01",
    "capacity": f"{UNBALANCED} {MOE}capacity_factor=1.25",
}
"""The methods of balancing the load, by the name of the model."""

STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": INK, "marker": "X"},
    "no_balancing": {"color": COLOURS["hybrid"], "marker": "o"},
    "loss": {"color": COLOURS["attention"], "marker": "s"},
    "bias": {"color": COLOURS["state space"], "marker": "^"},
    "capacity": {"color": COLOURS["delta rule"], "marker": "D"},
}
GRID = tuple(f"model=delta_net model.name={name} {options}" for name, options in METHODS.items())
EXPERIMENT = "results/experts_text"


class Experts(Study):
    name = "experts"
    title = "Mixture of experts"
    history = ("largest_load", "dropped_share", "validation_bits_per_byte")
    sweeps: ClassVar[Mapping[str, Sweep]] = {
        "recorded": Sweep("experiment=experts_text seed=0,1,2 train.lr=3e-3,1e-2", GRID),
        "small": Sweep("experiment=experts_text seed=0,1,2 train.lr=1e-2 train.steps=120", GRID),
        "large": Sweep(
            "experiment=experts_text seed=0,1,2,3,4 train.lr=5e-4,1e-3,2e-3 model.d_model=512 model.depth=12"
            " model.channels.moe.num_experts=64 model.channels.moe.top_k=8 task.length=2048 task.eval_length=16384"
            " train.batch_size=64 train.steps=20000 train.eval_every=500 train.device=cuda",
            GRID,
        ),
    }

    def figures(self, runs: Runs) -> Sequence[Figure]:
        comparison = runs.comparison(EXPERIMENT)
        grid = plots.grid_text(comparison)
        return [
            Figure(
                "quality",
                "Left: bits per byte on the test split, less is better, at equal active parameters. Right: processor"
                " time per training step. Each seed, the range and the median; learning rate by median validation"
                f" among {grid}.",
                lambda axes: draw_quality(axes, comparison),
                columns=2,
                size=(10.4, 3.0),
            ),
            Figure(
                "loads",
                "Left: the busiest expert's load over the mean load in the training batch, mean over layers: 1 is"
                " balanced, 4 is the most that 2 of 8 experts allow. Right: the share of choices that found no room,"
                " which only a capacity brings. Thin lines are seeds, thick ones their median.",
                lambda axes: draw_loads(axes, comparison),
                columns=2,
                size=(10.4, 3.8),
            ),
        ]

    def tables(self, runs: Runs) -> Sequence[Table]:
        comparison = runs.comparison(EXPERIMENT)
        header, *rows = plots.table(comparison)
        more = ["active parameters", "busiest expert at the end", "dropped at the end"]
        cells = {
            setting.label: [f"{active_parameters(setting):,}", *load_cells(setting)] for setting in comparison.shown
        }
        return [Table("Every method", [header + more, *(row + cells.get(row[0], [""] * 3) for row in rows)])]

    def findings(self, runs: Runs) -> Sequence[Finding]:
        shown = {setting.label: setting for setting in runs.comparison(EXPERIMENT).shown}
        bits = {name: plots.median_of(setting) for name, setting in shown.items()}
        loads = {name: at_the_end(setting, "largest_load") for name, setting in shown.items() if name != "dense"}
        seconds = {name: statistics.median(per_step(setting)) for name, setting in shown.items()}
        best = min(value for name, value in bits.items() if name != "dense")
        return [
            Finding(
                "experts beat dense",
                "At equal active parameters experts model better than a dense layer (Shazeer et al. 2017)",
                ", ".join(f"{name} {value:.3f}" for name, value in bits.items()) + " bits per byte",
                best < bits["dense"],
            ),
            Finding(
                "loss and bias balance",
                "A loss (Fedus et al. 2021) or a bias (Wang et al. 2024) keeps loads nearer to balance than neither",
                "busiest over mean at the end: " + ", ".join(f"{name} {value:.2f}" for name, value in loads.items()),
                max(loads["loss"], loads["bias"]) < loads["no_balancing"],
            ),
            Finding(
                "the bias costs no quality",
                "Balancing by a bias costs less quality than balancing by a loss (Wang et al. 2024)",
                f"bias {bits['bias']:.3f}, loss {bits['loss']:.3f} bits per byte",
                bits["bias"] <= bits["loss"],
            ),
            Finding(
                "balancing is nearly free",
                "Balancing by loss or bias costs little time beside the experts themselves",
                "per step: " + ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in seconds.items()),
                max(seconds["loss"], seconds["bias"]) < 1.1 * seconds["no_balancing"],
            ),
        ]


def per_step(setting: Setting) -> list[float]:
    """Processor seconds."""
    return setting.values(lambda run: run.record["cost"]["processor_seconds"] / run.record["cost"]["steps"])


def active_parameters(setting: Setting) -> int:
    """The parameters that one token passes: all but the experts that it is not sent to."""
    model = setting.runs[0].config["model"]
    if model.get("channel", "swiglu") != "moe":
        return plots.parameters(setting)
    layer = build_channel_mixer("moe", d_model=model["d_model"], **model.get("channels", {}).get("moe", {}))
    experts = sum(weight.numel() for name, weight in layer.named_parameters() if name in ("w_gate", "w_in", "w_out"))
    config: Any = layer.config
    idle = experts * (config.num_experts - config.top_k) // config.num_experts
    return plots.parameters(setting) - model["depth"] * idle


def course(run: RecordedRun, metric: str) -> tuple[list[int], list[float]]:
    """Steps, and the mean over layers of a router's metric."""
    lines = [line for line in run.metrics if any(name.endswith(f"/{metric}") for name in line)]
    means = [float(np.mean([value for name, value in line.items() if name.endswith(f"/{metric}")])) for line in lines]
    return [line["step"] for line in lines], means


def at_the_end(setting: Setting, metric: str) -> float:
    return setting.median(lambda run: course(run, metric)[1][-1])


def load_cells(setting: Setting) -> list[str]:
    if setting.label == "dense":
        return ["", ""]
    return [f"{at_the_end(setting, 'largest_load'):.2f}", f"{at_the_end(setting, 'dropped_share'):.1%}"]


def draw_quality(panels: Sequence[Axes], comparison: Comparison) -> None:
    ordered = sorted(comparison.shown, key=plots.median_of)
    plots.draw_rows(panels[0], [(v.label, STYLES[v.label], v.values(test_of)) for v in ordered])
    panels[0].set_xlabel("Bits per byte on test")
    panels[0].set_title("Quality")
    plots.draw_rows(panels[1], [(v.label, STYLES[v.label], [1e3 * s for s in per_step(v)]) for v in ordered], digits=0)
    panels[1].set_xlim(left=0)
    panels[1].set_xlabel("Processor time (ms per step)")
    panels[1].set_title("Cost")


def draw_loads(panels: Sequence[Axes], comparison: Comparison) -> None:
    for axes, metric in zip(panels, ("largest_load", "dropped_share"), strict=True):
        ends = []
        for setting in comparison.shown:
            style, courses = STYLES[setting.label], [course(run, metric) for run in setting.finished]
            if not any(any(values) for _, values in courses):
                continue  # Without a router, or without a capacity.
            for steps, values in courses:
                axes.plot(steps, values, color=style["color"], alpha=0.35, linewidth=0.9)
            middle = np.median([values for _, values in courses], axis=0)
            axes.plot(courses[0][0], middle, markersize=5, **style)
            ends.append((setting.label, style["color"], (courses[0][0][-1], float(middle[-1]))))
        axes.set_xlabel("Training step")
        axes.set_xlim(left=0)
        plots.label_lines(axes, ends)
    panels[0].axhline(1, color=QUIET, linestyle=(0, (2, 2)), linewidth=1.2, zorder=1)
    panels[0].set_ylabel("Busiest expert's load over the mean")
    panels[1].set_ylabel("Choices without room")
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
