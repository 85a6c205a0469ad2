"""Recall against state: how much of what was shown each mixer recalls with so many bytes of state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
from matplotlib.axes import Axes

from experiments.report.figures import bytes_text
from experiments.report.statistics import Interval
from experiments.studies import plots
from experiments.studies.claims import decide, decide_one
from experiments.studies.protocol import IN_MINUTES, LONG_RUNS, Arm, Progress
from experiments.studies.records import model_of, state_after
from experiments.studies.study import Figure, Table
from experiments.studies.trained import Claim, Learnt, Results, Version
from experiments.studies.trained_study import TrainedStudy
from experiments.studies.trained_tables import mean_of, mean_text, not_learnt_text
from seqarch.layers.channel.mlp import SwiGlu
from seqarch.layers.mixer import Mixer

COMMON = "experiment=recall_state match.parameters=140k match.count=layers match.tolerance=3%"
"""The widths of every arm are solved for these parameters in the layers, and for its bytes of state."""

SIZES = (8, 20, 64)
"""KiB of state for one sequence, of both layers together, short convolutions included."""

LIKE_ZOOLOGY = 20
"""KiB: two heads of 32 keys by 32 values in each layer, as the delta rule of zoology's figure has at width 64."""

MIXERS = ("gla", "rwkv7", "mamba2", "delta_net", "gated_delta_net", "kda")
"""Those with a matrix as their state. Five have a value in zoology's figure; KDA is the delta rule with a decay of its
own for each key channel."""

WINDOW = Arm("sliding_window, 64 KiB", "model=sliding_window match.state_bytes=64KiB",
             {"mixer": "sliding_window", "state": "64"})  # fmt: skip
"""What a state of the same bytes competes with; in fewer bytes its heads would be 6 or 12 wide."""

LEARNT = Learnt("test_64_pairs_4", 0.5)
"""Of 4 pairs in 64 tokens; guessing among the four values is right in a quarter."""

TRAINED = "test"
"""64 pairs in 256 tokens, the hardest that is trained on."""

BY_PAIRS = {
    4: "test_64_pairs_4",
    8: "test_128_pairs_8",
    16: "test_pairs_16",
    32: "test_pairs_32",
    64: TRAINED,
    128: "test_512_pairs_128",
    256: "test_1024_pairs_256",
}
"""The test split of each number of pairs, in the shortest sequences that are tested with it."""

BY_LENGTH = {256: TRAINED, 1024: "test_1024", 4096: "test_4096"}
"""The test split of each length, with 64 pairs."""

MOST = "test_4096_pairs_256"
"""256 pairs in 4096 tokens: the most pairs in the longest sequences."""

MARGIN = 0.05
"""Of recall accuracy: less would change nobody's choice of a mixer."""


def arms(mixers: Sequence[str] = MIXERS, sizes: Sequence[int] = SIZES) -> tuple[Arm, ...]:
    """Attention, whose cache grows, every mixer at every size, and the window where its size is among them."""
    return (
        Arm("attention", "model=attention", {"mixer": "attention", "state": "grows"}),
        *(
            Arm(named(mixer, size), f"model={mixer} match.state_bytes={size}KiB", {"mixer": mixer, "state": f"{size}"})
            for mixer in mixers
            for size in sizes
        ),
        *((WINDOW,) if SIZES[-1] in sizes else ()),
    )


def named(mixer: str, size: int) -> str:
    return f"{mixer}, {size} KiB"


ORDERS = (
    ("the delta rule above GLA", "The delta rule recalls more than GLA", "delta_net", "gla", MARGIN,
     "expected from zoology"),
    ("the delta rule above Mamba-2", "The delta rule recalls more than Mamba-2", "delta_net", "mamba2", MARGIN,
     "expected from zoology"),
    ("the gate above the delta rule", "The gated delta rule recalls more than the delta rule", "gated_delta_net",
     "delta_net", MARGIN, "expected from zoology"),
    ("the gate no worse", "The gated delta rule recalls no less than the delta rule", "gated_delta_net", "delta_net",
     -MARGIN, "Yang et al. 2024"),
    ("a decay per channel no worse", "KDA recalls no less than the gated delta rule", "kda", "gated_delta_net",
     -MARGIN, "Kimi Team 2025"),
    ("RWKV-7 above GLA", "RWKV-7 recalls more than GLA", "rwkv7", "gla", MARGIN, "expected from zoology"),
)  # fmt: skip
"""Of claims: name, statement, the mixers on its left and right, margin and source."""


def claims() -> tuple[Claim, ...]:
    small, large = SIZES[0], SIZES[-1]
    follows = [
        Claim(
            f"{mixer}: recall follows the state",
            f"{mixer} recalls more with {large} KiB of state than with {small} (Arora et al. 2024)",
            ((named(mixer, large), named(mixer, small)),),
            "more",
            MARGIN,
        )
        for mixer in MIXERS
    ]
    like, window = LIKE_ZOOLOGY, (named("gla", large), WINDOW.name)
    ordered = [
        Claim(name, f"{said}, with {like} KiB ({source})", ((named(left, like), named(right, like)),), "more", margin)
        for name, said, left, right, margin, source in ORDERS
    ]
    return (
        *follows,
        *ordered,
        Claim("a state above a window", f"With {large} KiB GLA recalls more than attention over a window of the same"
              " bytes (Arora et al. 2024)", (window,), "more", MARGIN),
        Claim("as good as attention", f"With {like} KiB the gated delta rule recalls 64 pairs as attention does, which"
              " keeps 13 times as much (expected from zoology)",
              ((named("gated_delta_net", like), "attention"),), "equal", MARGIN),
    )  # fmt: skip


class RecallState(TrainedStudy):
    name = "recall_state"
    title = "What does recall ask of a state?"
    question = (
        "How much of 4 to 256 pairs does a model recall with 8, 20 or 64 KiB of state, by mixer, at equal parameters;"
        " and how much does attention, which keeps everything?"
    )
    history = ("validation_accuracy", "validation_loss")
    versions: ClassVar[Mapping[str, Version]] = {
        "recorded": Version(
            COMMON,
            arms(),
            replace(LONG_RUNS, tests_for_reporting=True),
            claims(),
            LEARNT,
        ),
        "small": Version(
            f"{COMMON} task.vocab_size=1024 'task.train_on=[{{length: 64, pairs: 4}}, {{}}]' task.test_examples=16"
            " 'task.test_on=[{length: 64, pairs: 4}, {length: 1024, pairs: 256}]'"
            " train.steps=200 train.plateau_tokens=102400",
            arms(("delta_net",), (8, 20)),
            IN_MINUTES,
        ),
    }  # fmt: skip

    def answer(self, results: Results) -> str:
        answers = {decision.claim.name: decision.verdict.answer for decision in decide(results)}
        follows = [answers.get(f"{mixer}: recall follows the state", "unresolved") for mixer in MIXERS]
        return (
            f"{follows.count('yes')} of {len(MIXERS)} mixers recall more of 64 pairs, by {MARGIN:g} or above, with"
            f" {SIZES[-1]} KiB of state than with {SIZES[0]} ({follows.count('no')} do not,"
            f" {follows.count('unresolved')} are unresolved). That the delta rule recalls more than Mamba-2 with"
            f" {LIKE_ZOOLOGY} KiB: {answers.get('the delta rule above Mamba-2', 'unresolved')}; that so much of gated"
            f" delta rule is as good as attention's cache: {answers.get('as good as attention', 'unresolved')}."
            f"{not_learnt_text(results)}"
        )

    def figures(self, results: Results) -> Sequence[Figure]:
        return [
            Figure(
                "frontier",
                "Recall against the bytes of state after the sequence, at the rate that tuning chose: means over the"
                " reporting seeds with 95 % intervals. Left as in training, right with four times the pairs. The grey"
                " line is the frontier: the best mean with so many bytes or fewer.",
                partial(draw_frontiers, results=results),
                columns=2,
                size=(12.6, 5.2),
            ),
            Figure(
                "pairs",
                "Above: recall against the number of pairs, each in the shortest sequences that were tested with it;"
                " right of the dotted line are more than in training. Below: 64 pairs against the length; right of the"
                " dotted line it is longer than in training. A panel is a size of state; attention is in all of them,"
                " dashed. Each reporting seed, and their medians joined.",
                partial(draw_pairs, results=results),
                columns=3,
                rows=2,
                size=(14.6, 8.6),
            ),
        ]

    def tables(self, results: Results) -> Sequence[Table]:
        shown = {"64 in 256 tokens": TRAINED, "256 in 1,024": BY_PAIRS[256], "64 in 4,096": BY_LENGTH[4096],
                 "256 in 4,096": MOST}  # fmt: skip
        header = ["arm", "state after 256 tokens", "heads x K x V", "hidden", *shown]
        rows = [[progress.arm.name, state_text(progress), *layout(progress),
                 *(mean_text(progress, split) for split in shown.values())]
                for progress in results.arms.values()]  # fmt: skip
        return [Table("Recall of so many pairs: mean (95 % interval)", [header, *rows]), orders(results)]


def state_text(progress: Progress) -> str:
    runs = [run for run in progress.reporting if run.finished]
    return bytes_text(state_after(runs[0], 256)) if runs else ""


def layout(progress: Progress) -> tuple[str, str]:
    """The state of a layer as heads x keys x values, or attention's heads x width, and the channel mixer's width."""
    runs = [run for run in progress.reporting if run.finished]
    if not runs:
        return "", ""
    model = model_of(runs[0])
    mixer = next(part for part in model.modules() if isinstance(part, Mixer))
    channel = next((part for part in model.modules() if isinstance(part, SwiGlu)), None)
    shape = getattr(mixer, "state_shape", None) or (mixer.config.heads, mixer.config.head_width)
    return " x ".join(map(str, shape)), "" if channel is None else str(channel.config.hidden_width)


def orders(results: Results) -> Table:
    """The differences of the claims on two mixers at every size, of which one size decides."""
    header = ["difference", *(f"{size} KiB" for size in SIZES)]
    pairs = dict.fromkeys((left, right) for _, _, left, right, _, _ in ORDERS)
    rows = [[f"{left} less {right}", *(difference_text(results, left, right, size) for size in SIZES)]
            for left, right in pairs]  # fmt: skip
    note = f"The claims are on {LIKE_ZOOLOGY} KiB; where runs did not learn or converge, differences say little."
    return Table("Recall of 64 pairs between mixers: mean difference (95 % interval)", [header, *rows], note)


def difference_text(results: Results, left: str, right: str, size: int) -> str:
    decision = decide_one(results, Claim("", "", ((named(left, size), named(right, size)),), "more", 0.0))
    if (found := decision.interval) is None:
        return ""
    return f"{found.estimate:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def draw_frontiers(panels: Sequence[Axes], results: Results) -> None:
    for axes, pairs, length in zip(panels, (64, 256), (256, 1024), strict=True):
        draw_frontier(axes, results, BY_PAIRS[pairs], length)
        axes.set_title(f"{pairs} pairs in {length:,} tokens")
        axes.set_xlabel("Bytes of state (logarithmic)")
    panels[0].set_ylabel("Recall")


def draw_frontier(axes: Axes, results: Results, split: str, length: int) -> None:
    points: dict[str, list[tuple[float, Interval]]] = {}
    for progress in results.arms.values():
        if (found := mean_of(progress, split)) is not None:
            size = state_after(next(run for run in progress.reporting if run.finished), length)
            points.setdefault(progress.arm.factors["mixer"], []).append((size, found))
    everything = sorted((size, found.estimate) for each in points.values() for size, found in each)
    plots.shares(axes)
    if everything:
        sizes, best = [size for size, _ in everything], np.maximum.accumulate([mean for _, mean in everything])
        axes.step(sizes, best, where="post", color="#BBBBBB", linewidth=4, zorder=1, solid_joinstyle="round")
        plots.byte_axis(axes, sizes, every=2)
    ends = []
    for place, (mixer, each) in enumerate(points.items()):
        style = plots.mixer_style(mixer)
        shift = 1.02 ** (place - len(points) / 2)  # So that intervals at one size stand side by side.
        x, y = [size * shift for size, _ in each], [found.estimate for _, found in each]
        reach = [[max(found.estimate - max(found.low, 0), 0) for _, found in each],
                 [max(min(found.high, 1) - found.estimate, 0) for _, found in each]]  # fmt: skip
        axes.errorbar(x, y, reach, markersize=7, markeredgecolor="white", elinewidth=1.2, zorder=3, **style)
        ends.append((mixer, style["color"], (x[-1], y[-1])))
    plots.label_lines(axes, ends)


def draw_pairs(panels: Sequence[Axes], results: Results) -> None:
    for column, size in enumerate(SIZES):
        chosen = [
            progress for progress in results.arms.values() if progress.arm.factors["state"] in ("grows", f"{size}")
        ]
        for row, (splits, trained_to) in enumerate(((BY_PAIRS, 64), (BY_LENGTH, 256))):
            axes = panels[3 * row + column]
            draw_splits(axes, chosen, splits)
            axes.axvline(trained_to * 1.1, color="#999999", linestyle=(0, (1, 2)), linewidth=1.0)
            plots.logarithmic(axes, list(splits), lambda value: f"{value:,.0f}")
        panels[column].set_title(f"{size} KiB of state")
        panels[column].set_xlabel("Pairs (logarithmic)")
        panels[3 + column].set_xlabel("Tokens with 64 pairs (logarithmic)")
    for axes in (panels[0], panels[3]):
        axes.set_ylabel("Recall")


def draw_splits(axes: Axes, chosen: Sequence[Progress], splits: Mapping[int, str]) -> None:
    plots.shares(axes)
    ends = []
    for progress in chosen:
        runs, mixer = [run for run in progress.reporting if run.finished], progress.arm.factors["mixer"]
        points = [(x, [float(items.mean()) for run in runs if (items := run.items(split)) is not None])
                  for x, split in splits.items()]  # fmt: skip
        if points := [point for point in points if point[1]]:
            line = plots.dashed(mixer == "attention")
            style = plots.mixer_style(mixer)
            ends.append((mixer, style["color"], plots.draw_series(axes, points, style, **line)))
    plots.label_lines(axes, ends)
