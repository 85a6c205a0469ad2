"""Recall is bought with state: MQAR accuracy against bytes of state, by mixer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import ClassVar

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.report.comparison import Comparison, Setting
from experiments.report.figures import bytes_text, test_of
from experiments.studies import plots
from experiments.studies.study import Figure, Finding, Runs, Study, Table
from experiments.studies.sweep import Sweep
from experiments.util.plot_style import QUIET

EXPERIMENT = "results/recall_and_state"
HEADS = {
    name: f"model={name} model.mixers.{name}.num_heads="
    for name in ("delta_net", "gated_delta_net", "gla", "retention")
}
GRID = (
    "model=attention",
    HEADS["delta_net"] + "16,8,2",
    HEADS["gla"] + "16,2",
    "model=mamba2 model.mixers.mamba2.d_state=4,16,64",
    HEADS["gated_delta_net"] + "16,2",
    HEADS["retention"] + "2",
)
SMALL = (
    "model=attention",
    HEADS["delta_net"] + "16,2",
    HEADS["gla"] + "16,2",
    "model=mamba2 model.mixers.mamba2.d_state=4,16",
    HEADS["retention"] + "2",
)
LARGE = (
    "model=attention",
    *(HEADS[name] + "8,4,2,1" for name in HEADS),
    "model=mamba2 model.mixers.mamba2.d_state=16,32,64,128",
    "model=linear_attention,rwkv7,mamba",
    "model=based model.mixers.based.key_width=8,16",
)
EQUAL_STATE = 20 * 1024
"""Bytes at which mixers are compared: each by its setting nearest to that."""


class RecallAndState(Study):
    name = "recall_and_state"
    title = "Recall is bought with state"
    history = ("validation_accuracy",)
    sweeps: ClassVar[Mapping[str, Sweep]] = {
        "recorded": Sweep("experiment=recall_and_state seed=0,1,2 train.lr=3e-3,1e-2", GRID),
        "small": Sweep("experiment=recall_and_state seed=0,1,2 train.lr=1e-2", SMALL),
        "large": Sweep(
            "experiment=recall_and_state seed=0,1,2,3,4 train.lr=1e-3,3e-3,1e-2,3e-2 model.d_model=64,128,256"
            " task.vocab_size=8192 task.length=256 task.pairs=64 train.batch_size=256 train.steps=8000"
            " train.eval_every=500 train.device=cuda",
            LARGE,
        ),
    }

    def figures(self, runs: Runs) -> Sequence[Figure]:
        comparison = chosen(runs)
        grid = plots.grid_text(comparison)
        return [
            Figure(
                "state",
                "Recall on the test split against the bytes of state after 64 tokens, as measured. Small marks are"
                " seeds, lines join medians, bars are ranges; the colour is the family, the marker the mixer."
                f" Learning rate of each point by median validation accuracy among {grid}.",
                lambda axes: draw_frontier(axes[0], comparison),
                size=(7.6, 4.6),
            ),
            Figure(
                "equal",
                "Left: each mixer at its best state, all of the same width and depth"
                f" ({plots.parameter_span(comparison)} parameters)."
                f" Right: each at the state nearest to {bytes_text(EQUAL_STATE)}, its bytes beside its name; attention"
                " has one size only, its cache of 64 tokens. Strokes are medians over seeds; chance is dashed.",
                lambda axes: draw_equal(axes, comparison),
                columns=2,
                size=(10.4, 3.6),
            ),
        ]

    def tables(self, runs: Runs) -> Sequence[Table]:
        return [Table("Every point", plots.table(chosen(runs)))]

    def findings(self, runs: Runs) -> Sequence[Finding]:
        models = plots.by_model(chosen(runs))
        best = {name: max(map(plots.median_of, settings)) for name, settings in models.items()}
        texts = {name: f"{name} {value:.3f}" for name, value in best.items()}
        sized = ("delta_net", "gla", "mamba2")
        ends = {name: plots.ends(models[name]) for name in sized}
        return [
            Finding(
                "attention recalls all",
                "Attention recalls everything (Arora et al. 2023)",
                texts["attention"],
                best["attention"] > 0.99,
            ),
            Finding(
                "more state, more recall",
                "Within a mixer, recall grows with its state (Arora et al. 2024)",
                "; ".join(f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in ends.items()),
                all(high > low for low, high in ends.values()),
            ),
            Finding(
                "delta rule above gated linear attention",
                "The delta rule recalls more than gated linear attention of the same state (Yang et al. 2024)",
                "; ".join(at_equal_state(models, name) for name in ("delta_net", "gla")),
                value_at(models, "delta_net") > value_at(models, "gla"),
            ),
            Finding(
                "delta rule above Mamba-2",
                "and more than Mamba-2 (zoology's figure)",
                "; ".join(at_equal_state(models, name) for name in ("delta_net", "mamba2")),
                value_at(models, "delta_net") > value_at(models, "mamba2"),
            ),
            Finding(
                "looking at the input",
                "Decays that do not look at the input recall far less than those that do (the same figure)",
                "; ".join(at_equal_state(models, name) for name in ("gla", "mamba2", "retention")),
                value_at(models, "retention") < min(value_at(models, "gla"), value_at(models, "mamba2")) - 0.1,
            ),
            *(gated(models) if "gated_delta_net" in models else []),
        ]


def gated(models: Mapping[str, list[Setting]]) -> list[Finding]:
    return [
        Finding(
            "the gated delta rule is no worse",
            "The gated delta rule recalls no less than the delta rule (Yang et al. 2024, Gated Delta Networks)",
            "; ".join(at_equal_state(models, name) for name in ("gated_delta_net", "delta_net")),
            value_at(models, "gated_delta_net") >= value_at(models, "delta_net") - 0.02,
        )
    ]


def chosen(runs: Runs) -> Comparison:
    return runs.comparison(EXPERIMENT)


def value_at(models: Mapping[str, list[Setting]], name: str) -> float:
    return plots.median_of(plots.nearest(models[name], EQUAL_STATE))


def at_equal_state(models: Mapping[str, list[Setting]], name: str) -> str:
    setting = plots.nearest(models[name], EQUAL_STATE)
    return f"{name} {plots.median_of(setting):.3f} at {bytes_text(plots.state_bytes(setting))}"


def draw_frontier(axes: Axes, comparison: Comparison) -> None:
    ends = []
    for name, settings in plots.by_model(comparison).items():
        style = plots.mixer_style(settings[0].pattern)
        points = [(plots.state_bytes(setting), setting.values(test_of)) for setting in settings]
        ends.append((name, style["color"], plots.draw_series(axes, points, style)))
    sizes = [plots.state_bytes(setting) for setting in comparison.shown]
    axes.set_xlim(min(sizes) / 1.15, max(sizes) * 1.15)
    plots.byte_axis(axes, sizes)
    axes.set_xlabel("State after 64 tokens (bytes, logarithmic)")
    axes.set_ylabel("Recall accuracy on test")
    plots.shares(axes)
    plots.mark_chance(axes, comparison.shown[0].finished[0])
    plots.label_lines(axes, ends)
    draw_pareto(axes, comparison)
    axes.set_title("Recall against the size of the state")


def draw_pareto(axes: Axes, comparison: Comparison) -> None:
    """The best median at each size of state or below."""
    best, line = -1.0, []
    for setting in sorted(comparison.shown, key=plots.state_bytes):
        if plots.median_of(setting) > best:
            best = plots.median_of(setting)
            line.append((plots.state_bytes(setting), best))
    right = axes.get_xlim()[1]
    axes.step([*(x for x, _ in line), right], [*(y for _, y in line), best], where="post", color=QUIET, linewidth=4,
              alpha=0.25, zorder=1)  # fmt: skip
    key = Line2D([], [], color=QUIET, linewidth=4, alpha=0.25)
    axes.legend([key], ["best at this state or less"], loc="center right", fontsize=8, frameon=False)


def draw_equal(axes: Sequence[Axes], comparison: Comparison) -> None:
    models = plots.by_model(comparison)
    best = [max(settings, key=plots.median_of) for settings in models.values()]
    near = [plots.nearest(settings, EQUAL_STATE) for settings in models.values()]
    views = ((axes[0], best, "Equal width and depth, best state"), (axes[1], near, "Nearest to equal state"))
    for panel, settings, title in views:
        ordered = sorted(settings, key=plots.median_of, reverse=True)
        plots.draw_rows(panel, [(row_label(setting), plots.mixer_style(setting.pattern), setting.values(test_of))
                                for setting in ordered])  # fmt: skip
        panel.set_xlim(-0.02, 1.03)
        panel.axvline(statistics.median(v.finished[0].record["metric"]["chance"] for v in settings), color=QUIET,
                      linestyle=(0, (2, 2)), linewidth=1.2, zorder=1)  # fmt: skip
        panel.set_xlabel("Recall accuracy on test")
        panel.set_title(title)


def row_label(setting: Setting) -> str:
    return f"{plots.model_name(setting)}, {bytes_text(plots.state_bytes(setting))}"
