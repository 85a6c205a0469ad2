"""Length: trained on short sequences, evaluated on long ones: which models extrapolate, at which cost per token."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from matplotlib.axes import Axes

from experiments.config.build import build_model
from experiments.config.schema import run_config
from experiments.report.comparison import Comparison, Setting
from experiments.report.figures import bytes_text, mark_length
from experiments.runs.recorded import RecordedRun
from experiments.studies import plots
from experiments.studies.study import Figure, Finding, Runs, Study, Table
from experiments.studies.sweep import Sweep
from seqarch.models import LanguageModel

EXPERIMENT = "results/length_text"
GRID = (
    "model=attention,sliding_window,mamba2,gated_delta_net",
    "model=attention model.name=attention_no_position model.mixers.attention.position=none",
)
WORSE = 0.05
"""Bits per byte by which a model must be worse far beyond its training length to count as failing there."""


class Length(Study):
    name = "length"
    title = "Beyond the length of training"
    sweeps: ClassVar[Mapping[str, Sweep]] = {
        "recorded": Sweep("experiment=length_text seed=0,1,2 train.lr=3e-3,1e-2", GRID),
        "small": Sweep("experiment=length_text seed=0,1,2 train.lr=1e-2 train.steps=120", GRID),
        "large": Sweep(
            "experiment=length_text seed=0,1,2,3,4 train.lr=5e-4,1e-3,2e-3 model.d_model=512 model.depth=12"
            " task.length=512 task.eval_length=16384 train.batch_size=128 train.steps=20000 train.eval_every=1000"
            " train.device=cuda",
            (*GRID, "model=retention,rwkv7,hybrid"),
        ),
    }
    history = ("validation_bits_per_byte",)

    def figures(self, runs: Runs) -> Sequence[Figure]:
        comparison = runs.comparison(EXPERIMENT)
        curve = curve_of(comparison.shown[0].finished[0])
        return [
            Figure(
                "position",
                "Bits per byte against the position in a held-out file, mean over files and over the positions between"
                f" two marks; less is better. No model was trained beyond the dotted line at {curve['trained_to']}"
                " bytes. Thin lines are seeds, thick ones medians; the dashed line is byte frequencies alone. Learning"
                f" rates by median validation among {plots.grid_text(comparison)}.",
                lambda axes: draw_positions(axes[0], comparison),
                size=(7.6, 4.6),
            ),
            Figure(
                "cost",
                "What one more byte costs after so much context: FLOPs (left) and bytes of state (right), by the"
                " formulas that the test suite holds to measurements. Dotted: the training length.",
                lambda axes: draw_costs(axes, comparison),
                columns=2,
                size=(10.4, 4.0),
            ),
        ]

    def tables(self, runs: Runs) -> Sequence[Table]:
        comparison = runs.comparison(EXPERIMENT)
        curve = curve_of(comparison.shown[0].finished[0])
        trained, end = curve["trained_to"], curve["x_end"]
        header = ["model", f"to {trained}", f"{end // 2} to {end}", f"FLOPs per byte at {trained}", f"at {end}",
                  f"state at {end}"]  # fmt: skip
        rows = []
        for setting in comparison.shown:
            model = built(setting)
            rows.append(
                [
                    setting.label,
                    *(plots.median_and_range(values) for values in (near(setting), far(setting))),
                    *(f"{model.step_flops(length):,}" for length in (trained, end)),
                    bytes_text(model.state_bytes(end)),
                ]
            )  # fmt: skip
        return [Table("Bits per byte by position, and what a byte costs", [header, *rows]),
                Table("Every model", plots.table(comparison))]  # fmt: skip

    def findings(self, runs: Runs) -> Sequence[Finding]:
        shown = {setting.label: setting for setting in runs.comparison(EXPERIMENT).shown}
        change = {name: statistics.median(far(v)) - statistics.median(near(v)) for name, v in shown.items()}
        ends = {name: statistics.median(far(setting)) for name, setting in shown.items()}
        recurrent = {name: ends[name] for name in ("mamba2", "gated_delta_net", "sliding_window")}

        return [
            Finding(
                "full attention fails beyond its training length",
                "Attention with rotary positions gets worse beyond the training length (Press et al. 2021, figure 1)",
                f"last half of the file less the trained part, bits per byte: {plots.format_values(change, '+')}",
                change["attention"] > WORSE,
            ),
            Finding(
                "recurrent states extrapolate",
                "Recurrent models and windows stay good (Gu and Dao 2023, on other tasks)",
                "the same, which is negative where a longer file is easier",
                max(change[name] for name in recurrent) <= WORSE,
            ),
            Finding(
                "far out the cheap models win",
                "Far beyond the training length a model of constant cost is better than full attention",
                f"last half of the file: {plots.format_values(ends)}",
                min(recurrent.values()) < min(ends["attention"], ends["attention_no_position"]),
            ),
        ]


def curve_of(run: RecordedRun) -> dict:
    return run.record["results"]["curve"]


def mean_between(run: RecordedRun, low: float, high: float) -> float:
    """Bits per byte over positions ``low`` to ``high``: the mean of the bins within, weighed by their widths."""
    curve = curve_of(run)
    x = np.array(curve["x"])
    edges = np.sqrt(x[:-1] * x[1:])
    widths = np.diff([0.0, *edges, curve["x_end"]])
    inside = (x > low) & (x <= high)
    return float(np.average(np.array(curve["y"])[inside], weights=widths[inside]))


def near(setting: Setting) -> list[float]:
    """Each seed's bits per byte over the later half of the length that it was trained on."""
    return setting.values(lambda run: mean_between(run, curve_of(run)["trained_to"] / 2, curve_of(run)["trained_to"]))


def far(setting: Setting) -> list[float]:
    """Each seed's bits per byte over the later half of the files."""
    return setting.values(lambda run: mean_between(run, curve_of(run)["x_end"] / 2, curve_of(run)["x_end"]))


def built(setting: Setting) -> LanguageModel:
    return build_model(run_config({**setting.runs[0].config, "runs": "runs"}))


def draw_positions(axes: Axes, comparison: Comparison) -> None:
    first, ends = curve_of(comparison.shown[0].finished[0]), []
    for setting in comparison.shown:
        style, curves = style_of(setting), [curve_of(run) for run in setting.finished]
        for curve in curves:
            axes.plot(curve["x"], curve["y"], color=style["color"], alpha=0.3, linewidth=0.8)
        middle = np.median([curve["y"] for curve in curves], axis=0)
        axes.plot(first["x"], middle, markersize=4.5, markevery=2, **style)
        ends.append((setting.label, style["color"], (first["x"][-1], float(middle[-1]))))
    plots.logarithmic(axes, [2.0**power for power in range(0, 14, 2)] + [8192.0], lambda value: f"{value:,.0f}")
    axes.set_xlim(1, first["x_end"])
    axes.set_ylim(top=min(axes.get_ylim()[1], 6.5))
    axes.set_xlabel("Position in the file (bytes, logarithmic)")
    axes.set_ylabel("Bits per byte on test")
    plots.mark_chance(axes, comparison.shown[0].finished[0])
    mark_length(axes, first["trained_to"])
    plots.label_lines(axes, ends)


def style_of(setting: Setting) -> dict:
    """Attention without positions is dashed and has a marker of its own."""
    bare = {"linestyle": (0, (5, 1.5)), "marker": "P"} if "no_position" in setting.label else {}
    return {**plots.mixer_style(setting.pattern), **bare}


def draw_costs(panels: Sequence[Axes], comparison: Comparison) -> None:
    trained = curve_of(comparison.shown[0].finished[0])["trained_to"]
    lengths = [2**power for power in range(6, 18)]
    for axes, cost in zip(panels, (LanguageModel.step_flops, LanguageModel.state_bytes), strict=True):
        ends = []
        for setting in comparison.shown:
            if "no_position" in setting.label:
                continue  # At the cost of attention.
            model, style = built(setting), style_of(setting)
            values = [cost(model, length) for length in lengths]
            axes.plot(lengths, values, markersize=4, **style)
            ends.append((setting.label, style["color"], (lengths[-1], float(np.log10(values[-1])))))
        plots.logarithmic(axes, lengths[::3], lambda value: f"{value:,.0f}")
        axes.set_yscale("log")
        axes.set_xlabel("Context (bytes of text, logarithmic)")
        mark_length(axes, trained)
        axes.legend([name for name, *_ in ends], fontsize=8, frameon=False, loc="upper left")
    panels[0].set_ylabel("FLOPs of the next byte")
    panels[1].set_ylabel("State (bytes)")
