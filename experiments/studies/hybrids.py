"""A little attention goes a long way: layers of attention among recurrent ones, on recall and on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from matplotlib.axes import Axes

from experiments.report.comparison import Comparison, Setting
from experiments.report.figures import bytes_text, metric_label, test_of
from experiments.studies import plots
from experiments.studies.study import Figure, Finding, Runs, Study, Table
from experiments.studies.sweep import Sweep
from experiments.util.plot_style import COLOURS, pattern_mixers, spread
from seqarch.models import parse_pattern


def mixed(name: str, pattern: str) -> str:
    """The row of a grid for one hybrid."""
    return f"model=hybrid model.name={name} 'model.pattern=\"{pattern}\"'"


PURE = "model=attention,delta_net"
RATIOS = (
    mixed("1_to_1", "delta_net attention"),
    mixed("1_to_3", "2*delta_net attention delta_net"),
)
ONE_OF_EIGHT = (
    mixed("1_to_7", "4*delta_net attention 3*delta_net"),
    mixed("1_to_7_first", "attention 7*delta_net"),
    mixed("1_to_7_last", "7*delta_net attention"),
)
OTHER = ("model=gla", mixed("1_to_3_gla", "2*gla attention gla"))
MORE_STATE = "model=delta_net model.name=delta_net_2_heads model.mixers.delta_net.num_heads=2"
"""DeltaNet with about as many bytes of state at 64 tokens as 1 to 7: 83,968 and 79,872."""

RECALL, TEXT = "experiment=hybrids_recall", "experiment=hybrids_text"
RATES = {RECALL: "train.lr=3e-3,5e-3", TEXT: "train.lr=3e-3,6e-3"}
EXPERIMENTS = ("results/hybrids_recall", "results/hybrids_text")
SHARE_MARKERS = {0.0: "o", 0.125: "v", 0.25: "s", 0.5: "D", 1.0: "^"}
"""A marker for each share of layers that are attention."""

LARGE_HYBRIDS = (
    *RATIOS,
    *ONE_OF_EIGHT,
    mixed("1_to_3_first", "attention 3*delta_net"),
    mixed("1_to_3_last", "3*delta_net attention"),
    *OTHER,
    mixed("1_to_7_gla", "4*gla attention 3*gla"),
    "model=mamba2",
    mixed("1_to_3_mamba2", "2*mamba2 attention mamba2"),
)
LARGE_TASKS = (
    f"{RECALL} train.lr=1e-3,3e-3,1e-2 task.vocab_size=8192 task.length=256 task.pairs=64 train.batch_size=256"
    " train.steps=8000",
    f"{TEXT} train.lr=5e-4,1e-3,2e-3 task.length=2048 task.eval_length=16384 train.batch_size=64 train.steps=10000",
)


class Hybrids(Study):
    name = "hybrids"
    title = "A little attention goes a long way"
    sweeps: ClassVar[Mapping[str, Sweep]] = {
        "recorded": Sweep(
            "seed=0,1,2",
            tuple(f"{RECALL} {RATES[RECALL]} {row}" for row in (PURE, MORE_STATE, *RATIOS, *ONE_OF_EIGHT, *OTHER))
            + tuple(f"{TEXT} {RATES[TEXT]} {row}" for row in (PURE, *RATIOS, ONE_OF_EIGHT[0], *OTHER)),
        ),
        "small": Sweep(
            "seed=0,1,2 model.depth=4 train.lr=1e-2",
            tuple(f"{RECALL} train.steps=250 {row}" for row in (PURE, *RATIOS))
            + tuple(f"{TEXT} train.steps=100 {row}" for row in (PURE, RATIOS[1])),
        ),
        "large": Sweep(
            "seed=0,1,2 model.d_model=256 train.eval_every=500 train.device=cuda",
            tuple(f"{task} {row}" for task in LARGE_TASKS for row in (PURE, MORE_STATE, *LARGE_HYBRIDS)),
        ),
    }

    def figures(self, runs: Runs) -> Sequence[Figure]:
        recall, text = both(runs)
        marks = (
            "The marker is the share of attention layers: circle none, triangle downwards 1:7, square 1:3, diamond 1:1,"
            " triangle all."
        )
        return [
            Figure(
                "ratio",
                "Recall (left, more is better) and bits per byte of text (right, less is better) on the test splits"
                " against the share of layers that are attention, by the recurrence beside it. Small marks are seeds,"
                " lines join medians, bars are ranges; hybrids have attention in the middle of each"
                " group, recurrences four heads."
                f" Learning rates by median validation among {plots.grid_text(recall)} and {plots.grid_text(text)}.",
                lambda axes: draw_ratio(axes, (recall, text)),
                columns=2,
                size=(10.4, 4.0),
            ),
            Figure(
                "state",
                "The same runs against the bytes of state at the longest position: 64 tokens of recall, 1024 bytes of"
                f" text. {marks} Parameters: {plots.parameter_span(recall)} on recall, {plots.parameter_span(text)} on"
                " text.",
                lambda axes: draw_state(axes, (recall, text)),
                columns=2,
                size=(10.4, 4.0),
            ),
            Figure(
                "place",
                "Recall of every model: its seeds, their range and the median. Names say how many recurrent layers"
                " stand beside one of attention and where that is, in the middle unless it says otherwise. DeltaNet"
                " has four heads, or two and so twice the state.",
                lambda axes: draw_place(axes[0], recall),
                size=(7.6, 3.6),
            ),
        ]

    def tables(self, runs: Runs) -> Sequence[Table]:
        recall, text = both(runs)
        return [Table("Recall", plots.table(recall)), Table("Text", plots.table(text))]

    def findings(self, runs: Runs) -> Sequence[Finding]:
        recall, text = (medians(comparison) for comparison in both(runs))
        names = [name for name in ("1_to_7", "1_to_3", "1_to_1") if name in recall]
        mixed_text = [text[name] for name in names if name in text]
        found = [
            Finding(
                "attention brings recall",
                "Recall rises with the share of attention, most of it by one layer in four (arXiv 2507.06457)",
                format_medians(recall, "delta_net", *names, "attention"),
                rises(recall, "delta_net", *names, "attention")
                and recall["1_to_3"] - recall["delta_net"] > 0.5 * (recall["attention"] - recall["delta_net"]),
            ),
            Finding(
                "text hardly depends on the ratio",
                "Language modelling hardly depends on the ratio (the same): the hybrids differ by less than 0.05 bits"
                " per byte, and the best of them is no worse than either pure model",
                format_medians(text, "delta_net", *names, "attention"),
                max(mixed_text) - min(mixed_text) < 0.05
                and min(mixed_text) <= min(text["attention"], text["delta_net"]),
            ),
        ]
        if "delta_net_2_heads" in recall:
            found.append(
                Finding(
                    "at equal state",
                    "One layer of attention among eight is worth more than its bytes: a hybrid recalls more than a"
                    " recurrence with as much state (expected before the runs, without a source)",
                    format_medians(recall, "delta_net", "delta_net_2_heads", "1_to_7"),
                    recall["1_to_7"] > recall["delta_net_2_heads"],
                )
            )
        if "1_to_7_first" in recall:
            places = ("1_to_7_first", "1_to_7", "1_to_7_last")
            found.append(
                Finding(
                    "the place hardly matters",
                    "Where the one layer of attention stands matters less than that it is there",
                    format_medians(recall, *places, "delta_net"),
                    spread_of(recall, *places) < min(recall[name] for name in places) - recall["delta_net"],
                )
            )
        if "1_to_3_gla" in recall:
            found.append(
                Finding(
                    "the order of pure models is not that of hybrids",
                    "The best pure recurrence does not make the best hybrid (the same)",
                    format_medians(recall, "delta_net", "gla", "1_to_3", "1_to_3_gla"),
                    (recall["delta_net"] > recall["gla"]) != (recall["1_to_3"] > recall["1_to_3_gla"]),
                )
            )
        return found


def both(runs: Runs) -> tuple[Comparison, Comparison]:
    recall, text = (runs.comparison(name) for name in EXPERIMENTS)
    return recall, text


def medians(comparison: Comparison) -> dict[str, float]:
    return {setting.label: plots.median_of(setting) for setting in comparison.shown}


def format_medians(values: Mapping[str, float], *names: str) -> str:
    return plots.format_values({name: values[name] for name in names if name in values})


def rises(values: Mapping[str, float], *names: str) -> bool:
    """Whether values rise in this order, or fall by a hundredth at most."""
    return all(values[before] <= values[after] + 0.01 for before, after in pairwise(names))


def spread_of(values: Mapping[str, float], *names: str) -> float:
    return max(values[name] for name in names) - min(values[name] for name in names)


def share(setting: Setting) -> float:
    """The share of layers that are attention."""
    layers = parse_pattern(setting.pattern)
    return sum("attention" in layer.mixers for layer in layers) / len(layers)


def style(setting: Setting) -> dict[str, Any]:
    return {"color": setting.colour, "marker": SHARE_MARKERS[share(setting)]}


def on_a_line(setting: Setting) -> bool:
    """Whether a setting differs from the others in its share of attention alone."""
    return not setting.label.endswith(("first", "last", "heads"))


def draw_ratio(panels: Sequence[Axes], comparisons: Sequence[Comparison]) -> None:
    for axes, comparison in zip(panels, comparisons, strict=True):
        shown = [setting for setting in comparison.shown if on_a_line(setting)]
        for partner, dash in (("delta_net", "-"), ("gla", (0, (5, 1.5)))):
            line = sorted((v for v in shown if is_with(v, partner)), key=share)
            if len(line) < 2:
                continue
            axes.plot([share(v) for v in line], [plots.median_of(v) for v in line], linestyle=dash, zorder=2,
                      color=COLOURS["hybrid"], label=f"with {partner}")  # fmt: skip
        for setting in shown:
            plots.draw_seeds(axes, share(setting), setting.values(test_of), style(setting), size=5)
            axes.plot([share(setting)], [plots.median_of(setting)], markersize=9, markeredgecolor="white", zorder=4,
                      **style(setting))  # fmt: skip
        axes.set_xticks([0, 0.125, 0.25, 0.5, 1], ["none", "1:7", "1:3", "1:1", "all"])
        axes.set_xlabel("Layers of attention to recurrent layers")
        axes.legend(fontsize=8, frameon=False, loc="best")
        finish(axes, comparison)


def is_with(setting: Setting, partner: str) -> bool:
    """Whether a setting is on the line of that recurrence: alone, mixed, or attention alone where all lines end."""
    mixers = pattern_mixers(setting.pattern)
    return mixers == {"attention"} or partner in mixers


def draw_state(panels: Sequence[Axes], comparisons: Sequence[Comparison]) -> None:
    for axes, comparison in zip(panels, comparisons, strict=True):
        sizes = [plots.state_bytes(setting) for setting in comparison.shown]
        for setting in comparison.shown:
            plots.draw_seeds(axes, plots.state_bytes(setting), setting.values(test_of), style(setting), size=5)
            axes.plot([plots.state_bytes(setting)], [plots.median_of(setting)], markersize=9, markeredgecolor="white",
                      zorder=4, **style(setting))  # fmt: skip
        axes.set_xlim(min(sizes) / 1.4, max(sizes) * 1.4)
        plots.byte_axis(axes, sizes, every=1 if max(sizes) < 64 * min(sizes) else 2)
        length = comparison.sample["model"]["state_length"]
        axes.set_xlabel(f"State after {length:,} tokens (bytes, logarithmic)")
        finish(axes, comparison)
        label_points(axes, comparison)


def label_points(axes: Axes, comparison: Comparison) -> None:
    """Names in a column beside the plot, each joined to its median: many models have nearly the same state."""
    low, high = axes.get_ylim()
    ordered = sorted(comparison.shown, key=lambda setting: (plots.median_of(setting), -plots.state_bytes(setting)))
    heights = spread([plots.median_of(setting) for setting in ordered], 0.06 * (high - low), low, high)
    for setting, height in zip(ordered, heights, strict=True):
        axes.annotate(
            setting.label, (plots.state_bytes(setting), plots.median_of(setting)), (1.03, height),
            textcoords=axes.get_yaxis_transform(), va="center", ha="left", fontsize=8, color=setting.colour,
            annotation_clip=False, zorder=1,
            arrowprops={"arrowstyle": "-", "color": setting.colour, "linewidth": 0.6, "alpha": 0.5, "shrinkB": 4},
        )  # fmt: skip


def finish(axes: Axes, comparison: Comparison) -> None:
    sample = comparison.sample
    axes.set_title("Recall" if sample["metric"]["higher_is_better"] else "Text")
    axes.set_ylabel(f"{metric_label(comparison)} on test")
    if sample["metric"]["unit"] == "":
        plots.shares(axes)
        plots.mark_chance(axes, comparison.shown[0].finished[0])


def draw_place(axes: Axes, comparison: Comparison) -> None:
    ordered = sorted(comparison.shown, key=plots.median_of, reverse=True)
    plots.draw_rows(axes, [(f"{setting.label}, {bytes_text(plots.state_bytes(setting))}", style(setting),
                            setting.values(test_of)) for setting in ordered])  # fmt: skip
    axes.set_xlim(-0.02, 1.03)
    axes.set_xlabel("Recall accuracy on test")
