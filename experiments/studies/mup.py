"""Learning rates over widths: whether the rate that is best for a narrow model is best for a wide one, with muP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.report.statistics import Interval, Verdict, mean_interval, verdict
from experiments.studies import plots, trained_tables
from experiments.studies.protocol import Arm, Progress, Protocol, rate_of
from experiments.studies.study import Figure, Table
from experiments.studies.trained import Results, Version
from experiments.studies.trained_study import TrainedStudy
from experiments.util.plot_style import COLOURS

COMMON = "experiment=mup"
WIDTHS = (64, 128, 256)
MODELS = ("attention", "gla", "mamba2", "gated_delta_net", "rg_lru", "s4d")
"""One of each family of mixers."""

HEADS = {"gla": 4}
"""Heads at the narrowest width, of mixers whose heads are otherwise as many at every width."""

KINDS = ("standard", "muP")
MARGIN = 0.02
"""Of the bits per byte: what the narrow model's best rate may cost a wide one and still count as its best."""

DASHES = {64: (0, (1, 1)), 128: (0, (5, 1.5)), 256: "-"}


def arms(models: Sequence[str], widths: Sequence[int] = WIDTHS) -> tuple[Arm, ...]:
    return tuple(
        Arm(f"{model}, {kind}, {width}", _overrides(model, kind, width, widths[0]),
            {"model": model, "kind": kind, "width": str(width)})
        for model in models for kind in KINDS for width in widths
    )  # fmt: skip


def _overrides(model: str, kind: str, width: int, base: int) -> str:
    said = f"model={model} model.d_model={width}"
    if model in HEADS:
        said += f" model.mixers.{model}.num_heads={HEADS[model] * width // base}"
    return said + (f" model.mup_base_width={base}" if kind == "muP" else "")


@dataclass(frozen=True)
class Transfer:
    """What the best rate of the narrowest model costs the widest.

    Attributes:
        rates: the best of each width, in half decades.
        regret: validation bits per byte at that rate over those at the widest model's own best, less one: by seed.
    """

    model: str
    kind: str
    rates: tuple[int, ...]
    regret: Interval
    verdict: Verdict


def transfers(results: Results) -> list[Transfer]:
    """Of each model and parametrisation whose arms are all tuned."""
    found = [_transfer(model, kind, own) for (model, kind), own in _series(results)]
    return [each for each in found if each is not None]


def _series(results: Results) -> Iterator[tuple[tuple[str, str], list[Progress]]]:
    """The arms of a model in one parametrisation, from the narrowest on."""
    series: dict[tuple[str, str], list[Progress]] = {}
    for progress in results.arms.values():
        factors = progress.arm.factors
        series.setdefault((factors["model"], factors["kind"]), []).append(progress)
    yield from series.items()


def _transfer(model: str, kind: str, own: Sequence[Progress]) -> Transfer | None:
    best = [_best(progress) for progress in own]
    if any(each is None for each in best):
        return None
    rates = tuple(each for each in best if each is not None)
    narrow, wide = rates[0], rates[-1]
    losses = [_losses(own[-1], rate) for rate in (narrow, wide)]
    lacking = [
        f"the best rate of {progress.arm.name} lies at an edge of its grid" for progress in own if progress.at_edge
    ]
    if losses[0] is None or losses[1] is None:
        lacking.append(f"{own[-1].arm.name} was not tried, or failed, at {rate_of(narrow):g}")
        regret = Interval(float("nan"), float("nan"), float("nan"))
    else:
        regret = mean_interval((losses[0] / losses[1] - 1)[:, None])
    return Transfer(model, kind, rates, regret, verdict(regret, MARGIN, "equal", lacking))


def _best(progress: Progress) -> int | None:
    """The rate with the least mean of validation bits; ``None`` while the arm is being tuned."""
    return next((rate for rate in progress.rates if rate_of(rate) == progress.chosen), None)


def _losses(progress: Progress, rate: int) -> np.ndarray | None:
    """Of each seed, validation bits at a rate; ``None`` where a run is missing or failed."""
    seeds = progress.protocol.tuning_seeds
    runs = progress.of("tuning", rate_of(rate), seeds)
    if len(runs) < len(seeds) or not all(run.finished for run in runs):
        return None
    return np.array([run.result("validation") for run in runs])


class Mup(TrainedStudy):
    name = "mup"
    title = "Does a learning rate carry over to a wider model?"
    question = (
        "Is the learning rate that is best for a model of width 64 best for one of width 256, with the library's starts"
        " and one rate for all weights, and with the maximal update parametrisation?"
    )
    versions: ClassVar[Mapping[str, Version]] = {
        "recorded": Version(
            COMMON,
            arms(MODELS),
            Protocol(rates=(-6, -5, -4, -3), most_rates=7, tuning_seeds=(0, 1, 2), reporting_seeds=(), tie=0.0),
        ),
        "small": Version(
            f"{COMMON} train.steps=30 train.eval_every=30 task.length=64",
            arms(("gla",), (64, 128)),
            Protocol(rates=(-5, -4), most_rates=2, tuning_seeds=(0, 1), reporting_seeds=(), tie=0.0),
        ),
    }

    def answer(self, results: Results) -> str:
        found = {kind: [each for each in transfers(results) if each.kind == kind] for kind in KINDS}
        said = []
        for kind, own in found.items():
            yes = sum(each.verdict.answer == "yes" for each in own)
            no = sum(each.verdict.answer == "no" for each in own)
            if own:
                mean = np.mean([abs(each.rates[-1] - each.rates[0]) for each in own])
                said.append(
                    f"{kind}: the narrow model's rate costs the wide one less than {MARGIN:.0%} for {yes} of {len(own)}"
                    f" models ({no} more, {len(own) - yes - no} unresolved), and the best rate moves by"
                    f" {10 ** (mean / 2):.2g} times on average"
                )
        return ("; ".join(said) or "Nothing is tuned at every width yet") + "."

    def verdicts(self, results: Results) -> Table:
        header = ["model", "parametrisation", "best rate by width", "cost of the narrow model's rate (95 % interval)",
                  f"less than {MARGIN:.0%}"]  # fmt: skip
        rows = [
            [each.model, each.kind, ", ".join(f"{rate_of(rate):g}" for rate in each.rates), _percent(each.regret),
             _said(each.verdict)] for each in transfers(results)
        ]  # fmt: skip
        return Table("Verdicts", [header, *rows], "Costs are of validation bits per byte, by paired seeds.")

    def figures(self, results: Results) -> Sequence[Figure]:
        models = list(dict.fromkeys(progress.arm.factors["model"] for progress in results.arms.values()))
        return [
            Figure(
                "rates",
                "Validation bits per byte against the learning rate: the mean of the seeds, and their range as a band,"
                " by width (dotted 64, dashed 128, solid 256). Above the library's starts with one rate for all"
                " weights, below muP with base width 64. Runs that failed are left out.",
                lambda axes: draw_rates(axes, results, models),
                columns=len(models),
                rows=len(KINDS),
                size=(2.6 * len(models) + 0.6, 5.6),
            )
        ]

    def tables(self, results: Results) -> Sequence[Table]:
        return []

    def made(self, results: Results) -> Sequence[Table | str]:
        return [trained_tables.failures(results.runs)]


def _said(found: Verdict) -> str:
    return f"unresolved: {found.reason}" if found.answer == "unresolved" else f"**{found.answer}**"


def _percent(interval: Interval) -> str:
    if np.isnan(interval.estimate):
        return ""
    return f"{interval.estimate:+.1%} ({interval.low:+.1%} to {interval.high:+.1%})"


def draw_rates(panels: Sequence[Axes], results: Results, models: Sequence[str]) -> None:
    for (model, kind), own in _series(results):
        axes = panels[KINDS.index(kind) * len(models) + models.index(model)]
        style = {"color": plots.mixer_style(model)["color"]}
        for progress in own:
            points = [(rate_of(rate), [*losses]) for rate in progress.rates
                      if (losses := _losses(progress, rate)) is not None]  # fmt: skip
            if points:
                plots.draw_band(axes, points, style, linestyle=DASHES.get(int(progress.arm.factors["width"]), "-"))
        axes.set_xscale("log")
        axes.set_title(f"{model}\n{kind}")
        axes.set_xlabel("Learning rate")
    for row in range(len(KINDS)):
        panels[row * len(models)].set_ylabel("Validation bits per byte")
    keys = [Line2D([], [], color=COLOURS["hybrid"], linestyle=dash) for dash in DASHES.values()]
    plots.legend_below(panels, keys, [f"width {width}" for width in DASHES])
