"""Initialisation or architecture: recall under two initial embeddings and two initial gates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.report.statistics import mean_interval, share_interval, steps_to_threshold
from experiments.runs.recorded import RecordedRun
from experiments.studies import plots
from experiments.studies.claims import decide, scores_of, steps_to
from experiments.studies.protocol import IN_MINUTES, Arm, Progress, Protocol, rate_of
from experiments.studies.study import Figure, Table
from experiments.studies.trained import Claim, Results, Version
from experiments.studies.trained_study import TrainedStudy

SLOW = {
    "gla": "model.mixers.gla.decay_bias=4",
    "gated_delta_net": "model.mixers.gated_delta_net.dt_min=1e-4 model.mixers.gated_delta_net.dt_max=1e-3",
    "kda": "model.mixers.kda.dt_min=1e-4 model.mixers.kda.dt_max=1e-3",
    "mamba": "model.mixers.mamba.A_scale=0.01 model.mixers.mamba.dt_min=0.1 model.mixers.mamba.dt_max=1",
    "mamba2": "model.mixers.mamba2.A_min=0.01 model.mixers.mamba2.A_max=0.1 model.mixers.mamba2.dt_min=0.1"
    " model.mixers.mamba2.dt_max=1",
    "mlstm": "model.mixers.mlstm.forget_min=6 model.mixers.mlstm.forget_max=9",
}
"""Gates that forget more slowly at first, by mixer: for several times the length of a sequence, but in ``mamba`` and
``mamba2``, where the larger step sizes also write more. It is not one treatment: the parts of these two have arms."""

PARTS = {
    "slow decay alone": "model.mixers.mamba2.A_min=0.01 model.mixers.mamba2.A_max=0.1",
    "large steps alone": "model.mixers.mamba2.dt_min=0.1 model.mixers.mamba2.dt_max=1",
}
"""What slow gates of ``mamba2`` are made of."""

MIXERS = ("attention", "delta_net", "mamba2", "gated_delta_net", "gla", "kda", "mlstm", "mamba")
EMBEDDINGS = {"narrow": "0.02", "wide": "1"}
LEARNT = 0.9
"""Of validation accuracy: a mixer that has this much counts as having learnt the task."""
STYLES: dict[tuple[str, str], dict[str, Any]] = {
    ("narrow", "released"): {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    ("wide", "released"): {"color": "#56B4E9", "marker": "s", "linestyle": (0, (5, 1.5))},
    ("narrow", "slow"): {"color": "#D55E00", "marker": "^", "linestyle": (0, (5, 1.5))},
    ("wide", "slow"): {"color": "#882255", "marker": "D", "linestyle": "-"},
}
"""By embedding and gates; mixers without gates have the styles of released ones."""

CONTROL: dict[str, Any] = {"color": "#767676", "marker": "v", "linestyle": (0, (1, 1))}

MARGIN = 0.05
"""Of recall accuracy: less would change nobody's choice of a mixer."""


def arm(mixer: str, embedding: str, gates: str) -> Arm:
    """A mixer with one initial embedding, and gates that start as released or slow (``none`` where it has none)."""
    overrides = f"model={mixer} model.embedding_std={EMBEDDINGS[embedding]}"
    slow = f" {SLOW[mixer]}" if gates == "slow" else ""
    name = f"{mixer}, {embedding}" + ("" if gates == "none" else f", {gates}")
    return Arm(name, overrides + slow, {"mixer": mixer, "embedding": embedding, "gates": gates})


def arms(mixers: tuple[str, ...] = MIXERS) -> tuple[Arm, ...]:
    gates = {mixer: ("released", "slow") if mixer in SLOW else ("none",) for mixer in mixers}
    return tuple(arm(mixer, embedding, gate) for mixer in mixers for gate in gates[mixer] for embedding in EMBEDDINGS)


def controls() -> tuple[Arm, ...]:
    """Arms that take the starts apart.

    An embedding that is narrow and then scaled by 50 has the forward pass of a wide one at first, and each update of
    AdamW moves it as far relative to its size as a narrow one.
    """
    scaled = "model.embedding_std=0.02 model.embedding_scale=50"
    return (
        *(Arm(f"{mixer}, scaled, released", f"model={mixer} {scaled}",
              {"mixer": mixer, "embedding": "scaled", "gates": "released"}) for mixer in ("mamba2", "gated_delta_net")),
        *(Arm(f"mamba2, wide, {part}", f"model=mamba2 model.embedding_std=1 {overrides}",
              {"mixer": "mamba2", "embedding": "wide", "gates": part}) for part, overrides in PARTS.items()),
    )  # fmt: skip


def claims() -> tuple[Claim, ...]:
    own = [
        Claim(
            f"{mixer}: the start decides",
            f"{mixer} recalls more from a wide embedding and slow gates than as released (expected before the runs)",
            ((f"{mixer}, wide, slow", f"{mixer}, narrow, released"),),
            "more",
            MARGIN,
        )
        for mixer in SLOW
    ]
    speed = [
        Claim(
            f"{mixer}: the start sets the pace",
            f"As released, {mixer} takes more than twice as many steps to recall {LEARNT:.0%} as from a wide embedding"
            " and slow gates (expected before the runs)",
            ((f"{mixer}, narrow, released", f"{mixer}, wide, slow"),),
            "more",
            1.0,
            threshold=LEARNT,
        )
        for mixer in SLOW
    ]
    embeddings = [(f"{mixer}, wide, released", f"{mixer}, narrow, released") for mixer in SLOW]
    gates = [(f"{mixer}, narrow, slow", f"{mixer}, narrow, released") for mixer in SLOW]
    released, slow = "narrow, released", "wide, slow"
    return (
        *own,
        *speed,
        Claim("the embedding alone", "A wide embedding alone raises recall, over all mixers with gates",
              tuple(embeddings), "more", MARGIN),
        Claim("the gates alone", "Slow gates alone raise recall, over all mixers with gates",
              tuple(gates), "more", MARGIN),
        Claim("the delta rule above Mamba-2 as released", "The delta rule recalls more than Mamba-2 (zoology's figure)",
              (("delta_net, narrow", f"mamba2, {released}"),), "more", MARGIN),
        Claim("and from the other start", "and does so from a wide embedding and slow gates",
              (("delta_net, wide", f"mamba2, {slow}"),), "more", MARGIN),
        Claim("the gated delta rule is no worse",
              "The gated delta rule recalls no less than the delta rule, both from a wide embedding and the gated one"
              " from slow gates (Yang et al. 2024)",
              ((f"gated_delta_net, {slow}", "delta_net, wide"),), "more", -MARGIN),
    )  # fmt: skip


class Initialisation(TrainedStudy):
    name = "initialisation"
    title = "Initialisation or architecture?"
    question = (
        "How much of the differences in recall between mixers is decided by the initial embedding and the initial"
        " gates, and how much by the architecture?"
    )
    history = ("validation_accuracy", "validation_loss")
    versions: ClassVar[Mapping[str, Version]] = {
        "recorded": Version("experiment=initialisation", (*arms(), *controls()), Protocol(), claims()),
        "small": Version(
            "experiment=initialisation task.pairs=4 task.length=32 train.steps=400 train.plateau_tokens=102400"
            " train.target=0.99",
            arms(("attention", "mamba2")),
            IN_MINUTES,
        ),
    }

    def answer(self, results: Results) -> str:
        decisions = {decision.claim.name: decision for decision in decide(results)}
        recall = [decisions[f"{mixer}: the start decides"].verdict.answer for mixer in SLOW]
        pace = [decisions[f"{mixer}: the start sets the pace"].verdict.answer for mixer in SLOW]
        return (
            f"Trained until they have converged, {recall.count('yes')} of {len(SLOW)} mixers with gates recall more, by"
            f" {MARGIN:g} or above, from a wide embedding and slow gates than as released ({recall.count('no')} do not,"
            f" {recall.count('unresolved')} are unresolved); {pace.count('yes')} of them learn in less than half of the"
            f" steps ({pace.count('no')} do not, {pace.count('unresolved')} are unresolved)."
        )

    def figures(self, results: Results) -> Sequence[Figure]:
        return [
            Figure(
                "rates",
                "Recall on validation against the learning rate, at the end of training: means over the tuning seeds,"
                " bands are their ranges. A panel is a mixer, a line is a start: the embedding's standard deviation"
                " (narrow 0.02, wide 1) and the gates' initial values (as released, or slow). Runs that stopped on a"
                " plateau are shown as they ended, failed ones at nothing. Chance is dashed.",
                lambda axes: draw_rates(axes, results),
                columns=4,
                rows=2,
                size=(12.6, 5.8),
            ),
            Figure(
                "steps",
                f"Training steps until recall on validation reaches {LEARNT:.0%}, at the rate that tuning chose: each"
                " reporting seed, and the median as a stroke. Arrows are runs that ended before they reached it.",
                lambda axes: draw_steps(axes[0], results),
                size=(8.6, 6.4),
            ),
        ]

    def tables(self, results: Results) -> Sequence[Table]:
        header = ["arm", "recall, mean (95 % interval)", f"seeds with {LEARNT:.0%} (95 % interval)",
                  f"steps to {LEARNT:.0%}, median"]  # fmt: skip
        return [
            Table("Results on the reporting seeds", [header, *map(result_row, results.arms.values())]),
            given_up(results),
        ]


def given_up(results: Results) -> Table:
    """The reporting runs that ended on a plateau below what counts as learnt: they might have learnt later."""
    rows = []
    for progress in results.arms.values():
        runs = [run for run in progress.reporting if run.finished and run.result("test") < LEARNT]
        ended = [run.record["cost"]["steps"] for run in runs
                 if run.record["results"].get("stable_phase", {}).get("ending") == "plateau"]  # fmt: skip
        if ended:
            rows.append([progress.arm.name, f"{len(ended)} of {len(progress.reporting)}",
                         f"{min(ended):,} to {max(ended):,}"])  # fmt: skip
    header = ["arm", f"seeds that ended on a plateau below {LEARNT:.0%}", "after steps"]
    return Table("Runs that were given up", [header, *(rows or [["none", "", ""]])])


def result_row(progress: Progress) -> list[str]:
    """Recall, how many seeds learnt, and how soon."""
    runs = [run for run in progress.reporting if run.finished]
    if len(runs) < 2:
        return [progress.arm.name, "", "", ""]
    found = mean_interval(scores_of(progress, Claim("", "", (), "more", 0.0)))
    learnt, seeds = sum(run.result("test") >= LEARNT for run in runs), len(progress.reporting)
    share = share_interval(learnt, seeds)
    # A run that was given up before it was there counts with its whole budget.
    ends = [(steps if there else runs[0].config["train"]["steps"], there)
            for steps, there in (steps_to(run, LEARNT) for run in progress.reporting)]  # fmt: skip
    steps, reached = zip(*ends, strict=True)
    return [
        progress.arm.name,
        f"{found.estimate:.3f} ({max(found.low, 0):.3f} to {min(found.high, 1):.3f})",
        f"{learnt} of {seeds} ({share.low:.0%} to {share.high:.0%})",
        str(steps_to_threshold(steps, reached)),
    ]


def style_of(progress: Progress) -> dict[str, Any]:
    factors = progress.arm.factors
    return STYLES.get((factors["embedding"], "released" if factors["gates"] == "none" else factors["gates"]), CONTROL)


def draw_rates(panels: Sequence[Axes], results: Results) -> None:
    seeds = results.version.protocol.tuning_seeds
    for axes, mixer in zip(panels, MIXERS, strict=True):
        shown: list[RecordedRun] = []
        for progress in of_mixer(results, mixer):
            runs = {rate: progress.of("tuning", rate_of(rate), seeds) for rate in progress.rates}
            points = {rate: [run.result("validation") if run.finished else 0.0 for run in found]
                      for rate, found in runs.items()}  # fmt: skip
            shown += [run for found in runs.values() for run in found if run.finished]
            if any(points.values()):
                whole = [(rate_of(rate), values) for rate, values in points.items() if values]
                plots.draw_band(axes, whole, style_of(progress), markersize=5)
        tried = {rate for progress in of_mixer(results, mixer) for rate in progress.rates}
        rates = [rate_of(rate) for rate in sorted(tried)]
        plots.logarithmic(axes, rates, lambda value: f"{value:g}")
        axes.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
        plots.shares(axes)
        if shown:
            plots.mark_chance(axes, shown[0], label=False)
        axes.set_title(mixer)
    for axes in panels[-4:]:
        axes.set_xlabel("Learning rate (logarithmic)")
    for axes in (panels[0], panels[4]):
        axes.set_ylabel("Recall on validation")
    keys = [Line2D([], [], **style, markersize=5) for style in STYLES.values()]
    gates = {"released": "released gates or none", "slow": "slow gates"}
    names = [f"{embedding} embedding, {gates[kind]}" for embedding, kind in STYLES]
    plots.legend_below(panels, keys, names)


def of_mixer(results: Results, mixer: str) -> list[Progress]:
    return [progress for progress in results.arms.values()
            if progress.arm.factors["mixer"] == mixer and style_of(progress) is not CONTROL]  # fmt: skip


def draw_steps(axes: Axes, results: Results) -> None:
    rows = [progress for progress in results.arms.values() if len(progress.reporting) > 1]
    for row, progress in enumerate(reversed(rows)):
        style, found = style_of(progress), [steps_to(run, LEARNT) for run in progress.reporting if run.finished]
        for number, (steps, reached) in enumerate(found):
            height = row + 0.3 * (number / max(len(found) - 1, 1) - 0.5)
            marker = style["marker"] if reached else ">"
            face = style["color"] if reached else "white"
            axes.plot(steps, height, marker=marker, color=style["color"], markerfacecolor=face, markersize=5, alpha=0.8)
        if sum(reached for _, reached in found) > len(found) / 2:
            middle = statistics.median(steps if reached else np.inf for steps, reached in found)
            axes.plot([middle, middle], [row - 0.3, row + 0.3], color=style["color"], linewidth=2.2)
    axes.set_yticks(range(len(rows)), [progress.arm.name for progress in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    plots.logarithmic(axes, [50, 100, 200, 400, 800, 1600, 3200], lambda value: f"{value:,.0f}")
    axes.set_xlabel(f"Training steps to {LEARNT:.0%} recall (logarithmic)")
