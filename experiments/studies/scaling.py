"""Scaling: how the bits per byte of text fall with the size of a model that reads in proportion to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from matplotlib.axes import Axes

from experiments.report.statistics import Interval, Verdict, difference, mean_interval, verdict
from experiments.runs.recorded import RecordedRun
from experiments.studies import plots
from experiments.studies.claims import lacks
from experiments.studies.protocol import IN_MINUTES, LONG_RUNS, Arm, Progress, Protocol
from experiments.studies.records import model_of
from experiments.studies.study import Figure, Table
from experiments.studies.trained import Claim, Results, Version
from experiments.studies.trained_study import TrainedStudy
from experiments.studies.trained_tables import median_text

COMMON = "experiment=scaling task.corpus=golang-1.19-src match.count=layers match.tolerance=3%"
SMALL = "experiment=scaling name=studies/scaling task=stdlib_text task.length=64 task.eval_length=128 train.warmup=2"

WIDTHS = (16, 32, 48, 64, 96)
LARGE = (96, 112, 128, 160, 192)
"""The widest reads 24 MB, which is less than there is of training files: larger ones would read them again."""

PER_WIDTH = 32
"""Parameters of the two layers over the square of the width, for which ``match`` solves the channel mixer's."""

READ = 20
"""Bytes of text that a model reads for each parameter of its layers (Hoffmann et al. 2022, of tokens)."""

STEP = 4096
"""Bytes of a step."""

DELTA, MIXED = "gated_delta_net", "attention and gated_delta_net"
HEAD = 16
"""The width of a head of attention, and of the model for each head of the delta rule; all widths are multiples."""

MODELS = {
    "attention": "model=attention model.mixers.attention.num_heads={heads}",
    "mamba2": "model=mamba2",
    DELTA: "model=gated_delta_net model.mixers.gated_delta_net.num_heads={heads}",
    MIXED: "model=hybrid_delta model.mixers.attention.num_heads={heads} model.mixers.gated_delta_net.num_heads={heads}",
}

MARGIN = 0.02
"""Bits per byte."""

STEEPER = 0.01
"""Of the exponent: over a hundred times the parameters that is 5 % of the bits."""


def arms(
    models: Sequence[str] = tuple(MODELS), widths: Sequence[int] = WIDTHS, matched: bool = True
) -> tuple[Arm, ...]:
    return tuple(
        Arm(f"{model}, {width}", _overrides(model, width, matched), {"model": model, "width": str(width)})
        for model in models
        for width in widths
    )


def _overrides(model: str, width: int, matched: bool) -> str:
    said = f"{MODELS[model].format(heads=width // HEAD)} model.d_model={width}"
    if not matched:
        return said
    parameters = PER_WIDTH * width**2
    return f"{said} match.parameters={parameters} train.steps={round(READ * parameters / STEP)}"


def claims(widths: Sequence[int] = WIDTHS) -> tuple[Claim, ...]:
    widest = widths[-1]

    def claim(name: str, said: str, left: str, right: str) -> Claim:
        return Claim(name, said, ((f"{left}, {widest}", f"{right}, {widest}"),), "more", MARGIN)

    return (
        claim("the delta rule below attention", f"At width {widest} the gated delta rule takes fewer bits than"
              " attention (Yang et al. 2024)", DELTA, "attention"),
        claim("and below Mamba-2", "and fewer than Mamba-2 (Yang et al. 2024)", DELTA, "mamba2"),
        claim("both below one", "Attention and the gated delta rule together take fewer bits than attention alone"
              " (Waleffe et al. 2024)", MIXED, "attention"),
    )  # fmt: skip


@dataclass(frozen=True)
class Law:
    """The power law of a model: bits per byte are in proportion to a power of the parameters in its layers.

    Attributes:
        exponents: with a minus, of each reporting seed, by least squares of logarithms over all sizes.
        line: the slope and height of the means of logarithms, by the logarithm of the parameters, base two.
        worst: the largest share by which a size's mean lies off that line.
        lacking: why no verdict on it is possible.
    """

    model: str
    exponents: np.ndarray
    line: np.ndarray
    worst: float
    lacking: tuple[str, ...]

    @property
    def interval(self) -> Interval:
        return mean_interval(self.exponents[:, None])


def series(results: Results) -> Iterator[tuple[str, list[Progress]]]:
    """The arms of a model, from the smallest on."""
    found: dict[str, list[Progress]] = {}
    for progress in results.arms.values():
        found.setdefault(progress.arm.factors["model"], []).append(progress)
    yield from found.items()


def points(own: Sequence[Progress]) -> list[tuple[int, list[float]]]:
    """The parameters in the layers and the bits per byte of the reporting seeds, of each size that is there."""
    by_size = [[run for run in progress.reporting if run.finished] for progress in own]
    return [(size_of(runs[0]), [run.result("test") for run in runs]) for runs in by_size if runs]


def size_of(run: RecordedRun) -> int:
    """Parameters in the layers: without embedding and head, which a small model has most of its parameters in."""
    return sum(parameter.numel() for parameter in model_of(run).stack.parameters())


def laws(results: Results) -> list[Law]:
    """Of each model that has finished runs of three sizes and more, two seeds each."""
    found = []
    for model, own in series(results):
        sizes = [(count, bits) for count, bits in points(own) if len(bits) > 1]
        if len(sizes) < 3:
            continue
        seeds = min(len(bits) for _, bits in sizes)
        x = np.log2([count for count, _ in sizes])
        y = np.log2([bits[:seeds] for _, bits in sizes])
        slopes = np.polyfit(x, y, 1)[0]
        mean = y.mean(axis=1)
        line = np.polyfit(x, mean, 1)
        off = np.exp2(np.abs(mean - np.polyval(line, x))) - 1
        lacking = tuple(reason for progress in own for reason in lacks(progress))
        found.append(Law(model, -slopes, line, float(off.max()), lacking))
    return found


def steeper(results: Results) -> list[tuple[Law, Interval, Verdict]]:
    """Each model's exponent less attention's, and whether it is larger by more than the margin."""
    found = {law.model: law for law in laws(results)}
    if (base := found.pop("attention", None)) is None:
        return []
    compared = [(law, difference(law.exponents[:, None], base.exponents[:, None])) for law in found.values()]
    return [(law, interval, verdict(interval, STEEPER, "more", [*law.lacking, *base.lacking]))
            for law, interval in compared]  # fmt: skip


class Scaling(TrainedStudy):
    name = "scaling"
    title = "How do losses fall with the size of a model?"
    question = (
        "Does the loss of a recurrence on text fall as fast with its parameters as that of attention, where each model"
        " reads 20 bytes a parameter?"
    )
    versions: ClassVar[Mapping[str, Version]] = {
        "recorded": Version(
            COMMON,
            arms(),
            replace(LONG_RUNS, fixed_budget=True),
            claims(),
        ),
        "small": Version(
            f"{SMALL} task.validation_files=4 task.test_files=4 train.steps=20 train.eval_every=20",
            arms(("attention", DELTA), (16, 32, 48), matched=False),
            replace(IN_MINUTES, fixed_budget=True),
        ),
        "large": Version(
            f"{COMMON} task.length=2048 task.eval_length=16384 train.batch_size=2",
            arms(widths=LARGE),
            Protocol(rates=(-8, -7, -6, -5), most_rates=7, tuning_seeds=(100,), reporting_seeds=(0, 1, 2, 3, 4),
                     fixed_budget=True),
            claims(LARGE),
        ),
    }  # fmt: skip

    def answer(self, results: Results) -> str:
        found = laws(results)
        if not found:
            return "No model has runs of three sizes yet."
        exponents = ", ".join(f"{law.model} {law.interval.estimate:.3f}" for law in found)
        said = {"yes": "faster", "no": "no faster"}
        compared = "; ".join(f"{law.model} {said.get(decided.answer, 'unresolved whether faster')}"
                             for law, _, decided in steeper(results))  # fmt: skip
        return (
            f"Bits per byte fall with the parameters in the layers to the power of minus {exponents}. Against"
            f" attention, by more than {STEEPER:g}: {compared or 'nothing is known yet'}."
        )

    def figures(self, results: Results) -> Sequence[Figure]:
        return [
            Figure(
                "sizes",
                "Bits per byte of the test files against the parameters in the layers, both logarithmic: each reporting"
                " seed, the medians joined, and the power law as a thin line. Dashed: the hybrid.",
                lambda axes: draw_sizes(axes, results),
                size=(8.4, 5.2),
            )
        ]

    def tables(self, results: Results) -> Sequence[Table]:
        rows = [["model", "exponent (95 % interval)", "largest distance from the law", "less attention's",
                 f"steeper by {STEEPER:g}"]]  # fmt: skip
        beside = {law.model: (interval, decided) for law, interval, decided in steeper(results)}
        for law in laws(results):
            less, answer = "", ""
            if law.model in beside:
                interval, decided = beside[law.model]
                less, answer = _text(interval, "+"), _said(decided)
            rows.append([law.model, _text(law.interval), f"{law.worst:.1%}", less, answer])
        widths = dict.fromkeys(progress.arm.factors["width"] for progress in results.arms.values())
        bits = [["model", *(f"width {width}" for width in widths)]]
        for model, own in series(results):
            bits.append([model, *(_median(progress) for progress in own)])
        return [
            Table("Exponents of the bits per byte in the parameters of the layers", rows),
            Table("Bits per byte: median (and range) of the reporting seeds", bits),
        ]


def _text(interval: Interval, sign: str = "") -> str:
    return f"{interval.estimate:{sign}.3f} ({interval.low:{sign}.3f} to {interval.high:{sign}.3f})"


def _said(decided: Verdict) -> str:
    return f"unresolved: {decided.reason}" if decided.answer == "unresolved" else f"**{decided.answer}**"


def _median(progress: Progress) -> str:
    return median_text([run.result("test") for run in progress.reporting if run.finished])


def draw_sizes(panels: Sequence[Axes], results: Results) -> None:
    axes, ends, counts, seen = panels[0], [], [], []
    lines = {law.model: law.line for law in laws(results)}
    for model, own in series(results):
        if not (found := points(own)):
            continue
        style = plots.mixer_style(model.replace(" and ", " "))
        line = plots.dashed(" and " in model)
        ends.append((model, style["color"], plots.draw_series(axes, found, style, **line)))
        x = [count for count, _ in found]
        counts, seen = [*counts, *x], [*seen, *(value for _, bits in found for value in bits)]
        if model in lines:
            law = np.exp2(np.polyval(lines[model], np.log2(x)))
            axes.plot(x, law, color=style["color"], linewidth=0.8, zorder=1)
    if counts:
        plots.logarithmic(axes, _ticks(counts), lambda value: f"{value:,.0f}")
        low, high = min(seen), max(seen)
        plots.logarithmic(axes, np.geomspace(low, high, 5).round(2).tolist(), lambda value: f"{value:.2f}", "y")
    axes.set_xlabel("Parameters in the layers (logarithmic)")
    axes.set_ylabel("Bits per byte (logarithmic)")
    plots.label_lines(axes, ends)


def _ticks(counts: Sequence[float]) -> list[float]:
    """Powers of ten times 1, 2 and 5 within the range of some numbers."""
    low, high = min(counts), max(counts)
    every = [base * 10**power for power in range(12) for base in (1, 2, 5)]
    return [tick for tick in every if low <= tick <= high] or [low]
