"""Needles: at which depth and in how long a text each model still finds numbers, far beyond its training length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from experiments.report.maps import cells_of, draw_cells
from experiments.runs.recorded import RecordedRun
from experiments.studies import plots
from experiments.studies.claims import decide
from experiments.studies.protocol import IN_MINUTES, LONG_RUNS, Arm, Progress
from experiments.studies.study import Figure, Table
from experiments.studies.trained import Claim, Learnt, Results, Version
from experiments.studies.trained_study import TrainedStudy
from experiments.studies.trained_tables import mean_text, not_learnt_text, so_text

COMMON = "experiment=needle match.parameters=140k match.count=layers match.tolerance=3%"
"""The widths of every arm are solved for these parameters in the layers."""

STATE = "match.state_bytes=64KiB"
"""Of both layers together."""

HALF = "match.state_length=1 match.state_bytes=34KiB"
"""Of hybrids, after one token: 32 KiB in the recurrent layer, as much as each of the two layers of the others has; the
rest is attention's convolution and one token of its cache."""

MODELS = {
    "attention, rotary": "model=attention",
    "attention, no positions": "model=attention model.mixers.attention.position=none",
    "sliding_window": f"model=sliding_window {STATE}",
    "mamba2": f"model=mamba2 {STATE}",
    "delta_net": f"model=delta_net {STATE}",
    "gated_delta_net": f"model=gated_delta_net {STATE}",
    "attention and mamba2": f"model=hybrid {HALF}",
    "attention and gated_delta_net": f"model=hybrid_delta {HALF}",
}
"""Six models of two equal layers, and two of one layer of attention without positions before one of a recurrence."""

TRAINED_TO = 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
"""Bytes of the texts that are tested."""

FAR = 16384
"""Of the claims: eight times the longest text in training."""

MARGIN = 0.1
"""Of the numbers that are found whole: less would change nobody's choice of a model."""

FOUND = 0.9
"""Of the numbers of a length: a seed that has as many whole finds the needles there."""

POOLED = 2
"""Neighbouring bins of depth that make one of the map, five in all: each has few of the 32 texts."""

LEARNT = Learnt("test_512", 0.5)
"""Of the digits in texts of 512 bytes; chance is 0.1."""


def split_of(length: int) -> str:
    return "test" if length == TRAINED_TO else f"test_{length}"


def arms(names: Sequence[str] = tuple(MODELS)) -> tuple[Arm, ...]:
    return tuple(Arm(name, MODELS[name], {"model": name}) for name in names)


def claims() -> tuple[Claim, ...]:
    far, none, delta = split_of(FAR), "attention, no positions", "gated_delta_net"

    def claim(name: str, said: str, left: str, right: str, margin: float = MARGIN, split: str = far,
              kind: Literal["more", "equal"] = "more") -> Claim:  # fmt: skip
        return Claim(name, said, ((left, right),), kind, margin, split, whole=True)

    hybrids = [
        each
        for mixer in ("mamba2", delta)
        for each in (
            claim(f"a layer of attention helps {mixer}", f"In texts of 16,384 bytes a layer of attention before {mixer}"
                  f" finds more numbers than {mixer} alone (Waleffe et al. 2024)", f"attention and {mixer}", mixer),
            claim(f"and is enough with {mixer}", "and no fewer than attention without positions in every layer",
                  f"attention and {mixer}", none, -MARGIN),
            claim(f"to 65,536 bytes with {mixer}", f"In texts of 65,536 bytes, 32 times as long as in training,"
                  f" attention and {mixer} find more numbers than attention without positions (expected before the"
                  " runs)", f"attention and {mixer}", none, split=split_of(LENGTHS[-1])),
        )
    ]  # fmt: skip
    return (
        claim("as attention where trained", "In texts of 2048 bytes the gated delta rule finds as many numbers as"
              " attention (expected before the runs)", delta, none, split=split_of(TRAINED_TO), kind="equal"),
        claim("no positions reach farther", "In texts of 16,384 bytes attention finds more numbers without positions"
              " than with rotary ones (Kazemnejad et al. 2023)", none, "attention, rotary"),
        claim("rotary positions lose it", "In texts of 16,384 bytes the gated delta rule finds more numbers than"
              " attention with rotary positions (expected before the runs)", delta, "attention, rotary"),
        claim("the delta rule keeps what Mamba-2 loses", "In texts of 16,384 bytes the delta rule finds more numbers"
              " than Mamba-2 (Yang et al. 2024, with a repeated haystack)", "delta_net", "mamba2"),
        claim("and so does the gated one", "and so does the gated delta rule (Yang et al. 2024)", delta, "mamba2"),
        claim("a gate costs nothing here", "In texts of 16,384 bytes the gated delta rule finds no fewer numbers than"
              " the delta rule (Yang et al. 2024 have it a little behind)", delta, "delta_net", -MARGIN),
        *hybrids,
    )  # fmt: skip


class Needle(TrainedStudy):
    name = "needle"
    title = "Who finds a needle, how deep and how far?"
    question = (
        "Trained on texts of 256 to 2048 bytes, which models find numbers that are hidden in texts of up to 65,536"
        " bytes, and at which depth?"
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
            f"{COMMON} task.length=128 task.needles=1 task.questions=1 task.digits=2 task.train_on=[]"
            " 'task.test_lengths=[256,512]' train.batch_size=16 train.steps=300",
            arms(("attention, no positions", "gated_delta_net")),
            IN_MINUTES,
        ),
    }  # fmt: skip

    def answer(self, results: Results) -> str:
        answers = {decision.claim.name: decision.verdict.answer for decision in decide(results)}

        def said(name: str) -> str:
            return answers.get(name, "unresolved")

        return (
            f"In texts of {FAR:,} bytes, eight times as long as in training: that attention finds more without"
            f" positions than with rotary ones is {so_text(said('no positions reach farther'))}; that the delta rule"
            f" finds more than Mamba-2 is {so_text(said('the delta rule keeps what Mamba-2 loses'))}; that a layer of"
            " attention before the recurrence finds more is"
            f" {so_text(said('a layer of attention helps mamba2'))} of Mamba-2 and"
            f" {so_text(said('a layer of attention helps gated_delta_net'))} of the gated delta rule."
            f" Differences count from {MARGIN:g} of the numbers on, each of which counts where all its digits are"
            f" right.{not_learnt_text(results)}"
        )

    def figures(self, results: Results) -> Sequence[Figure]:
        shown = len(results.version.arms)
        columns = min(shown, 4)
        rows = -(-shown // columns)
        return [
            Figure(
                "depth",
                "Share of digits that are right, by how deep in the text the number stands (its beginning is at the"
                " top) and how long the text is: means over the reporting seeds, which all read the same 32 texts of a"
                " length. Right of the dashed line texts are"
                " longer than any in training. Chance is 0.1.",
                partial(draw_maps, results=results),
                columns,
                rows,
                size=(3.3 * columns + 0.6, 2.9 * rows + 0.3),
            ),
            Figure(
                "lengths",
                "Share of digits that are right against the length of the text: each reporting seed, and their medians"
                " joined. Trained on texts of up to the dotted line. Dashed: hybrids. Chance is grey.",
                partial(draw_lengths, results=results),
                size=(9.6, 5.2),
            ),
        ]

    def tables(self, results: Results) -> Sequence[Table]:
        lengths = [length for length in LENGTHS if length >= TRAINED_TO]
        digits = [["arm", *(f"{length:,}" for length in lengths)]]
        seeds = [list(digits[0])]
        for progress in results.arms.values():
            digits.append([progress.arm.name, *(mean_text(progress, split_of(length)) for length in lengths)])
            seeds.append([progress.arm.name, *(seeds_text(progress, length) for length in lengths)])
        return [
            Table("Share of digits by bytes of the text: mean (95 % interval)", digits),
            Table(f"Seeds that find {FOUND:.0%} of the numbers whole, by bytes of the text", seeds),
        ]


def accuracy(run: RecordedRun, length: int) -> float | None:
    """Of a run at a length; ``None`` where it was not tested there."""
    items = run.items(split_of(length)) if run.finished else None
    return None if items is None else float(items.mean())


def seeds_text(progress: Progress, length: int) -> str:
    found = [items for run in progress.reporting
             if run.finished and (items := run.items(split_of(length))) is not None]  # fmt: skip
    return f"{sum((items == 1).mean() >= FOUND for items in found)} of {len(progress.reporting)}" if found else ""


def draw_maps(panels: Sequence[Axes], results: Results) -> None:
    mesh = None
    for axes, progress in zip(panels, results.arms.values(), strict=False):
        cells = cells_of([run for run in progress.reporting if run.finished], POOLED)
        if cells is None:
            axes.set_xticks([])
            axes.set_yticks([])
        else:
            mesh = draw_cells(axes, cells, (0.0, 1.0), TRAINED_TO)
        axes.set_title(progress.arm.name + ("" if cells else ": none yet"), fontsize=10)
    for axes in panels[len(results.arms) :]:
        axes.set_visible(False)
    drawing = panels[0].get_figure(root=True)
    assert drawing is not None
    drawing.supylabel("Depth in the text", fontsize=10)
    drawing.supxlabel("Bytes of the text (logarithmic)", fontsize=10)
    if mesh is not None:
        bar = drawing.colorbar(mesh, ax=list(panels), pad=0.015, fraction=0.04, aspect=24)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        bar.set_label("Digits that are right")


def draw_lengths(panels: Sequence[Axes], results: Results) -> None:
    axes, ends = panels[0], []
    plots.shares(axes)
    for progress in results.arms.values():
        runs, name = [run for run in progress.reporting if run.finished], progress.arm.name
        points = [(length, [each for run in runs if (each := accuracy(run, length)) is not None]) for length in LENGTHS]
        if points := [point for point in points if point[1]]:
            line = plots.dashed(" and " in name)
            style = plots.mixer_style(name.partition(",")[0].replace(" and ", " "))
            if name == "attention, rotary":
                style |= {"marker": "v"}
            ends.append((name, style["color"], plots.draw_series(axes, points, style, **line)))
            if len(ends) == 1:
                plots.mark_chance(axes, runs[0])
    plots.label_lines(axes, ends)
    plots.logarithmic(axes, LENGTHS, lambda value: f"{value:,.0f}")
    axes.axvline(TRAINED_TO, color="#999999", linestyle=(0, (1, 2)), linewidth=1.0)
    axes.set_xlabel("Bytes of the text (logarithmic)")
    axes.set_ylabel("Digits that are right")
