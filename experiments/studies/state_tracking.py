"""State tracking: which recurrences follow a state that a word changes at every letter, and to which length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from matplotlib.axes import Axes

from experiments.report.statistics import mean_interval, share_interval
from experiments.runs.recorded import RecordedRun
from experiments.studies import plots
from experiments.studies.claims import decide, scores_of
from experiments.studies.protocol import IN_MINUTES, Arm, Progress, Protocol
from experiments.studies.study import Figure, Table
from experiments.studies.trained import Claim, Results, Version
from experiments.studies.trained_study import TrainedStudy

COMMON = "experiment=state_tracking name=studies/state_tracking"
"""With a name, since arms choose tasks, whose own name an experiment would have."""

LENGTHS = (64, 128, 256, 1024, 4096)
"""The training length and those that are tested beyond it."""

SOLVED = 0.95
"""Of a word's prefixes: a seed that names so many, on average over the words of a length, has solved that length."""

MARGIN = 0.2
"""Of accuracy: a mixer that is this much better tracks something that the other does not."""

TASKS = {
    "parity": "task=parity",
    "s3": "task=word_problem task.group=s3",
    "a5": (
        "task=word_problem task.group=a5 model.d_model=64 train.steps=8000"
        " 'task.train_on=[{length:2},{length:4},{length:8},{length:16},{length:32},{}]'"
    ),
}
"""A5 has 60 elements: it takes a wider model and short words to begin with."""

TITLES = {"parity": "Parity", "s3": "S3, of 6 elements", "a5": "A5, of 60 elements"}

SIGNED = ("mamba2", "gla", "delta_net")
"""Mixers that are tried with eigenvalues of the transition in (0, 1) and in (-1, 1)."""

CEILINGS = ("slstm", "gru")
"""Recurrences that are not linear in their state, so that nothing but training keeps them from following it."""

TRIED = {
    "parity": ("attention", *(f"{mixer}, {sign}" for mixer in SIGNED for sign in ("positive", "negative")),
               "mlstm", "rwkv7", *CEILINGS),
    "s3": ("attention", "mamba2, negative", "delta_net, negative",
           *(f"gated_delta_product, {count} steps" for count in (1, 2)), "mlstm", "rwkv7", *CEILINGS),
    "a5": ("attention", *(f"gated_delta_product, {count} steps" for count in (1, 2)), *CEILINGS),
}  # fmt: skip

DASHES = {"positive": (0, (5, 1.5))}


def overrides(model: str) -> str:
    """Of a model as it is named in tables: ``gla, negative``."""
    mixer, _, kind = model.partition(", ")
    chosen = f"model={mixer}"
    if kind in ("positive", "negative"):
        return f"{chosen} model.mixers.{mixer}.negative_eigenvalues={str(kind == 'negative').lower()}"
    return f"{chosen} model.mixers.{mixer}.steps={kind.split()[0]}" if kind else chosen


def arms(tried: Mapping[str, Sequence[str]]) -> tuple[Arm, ...]:
    return tuple(
        Arm(f"{task}: {model}", f"{TASKS[task]} {overrides(model)}", {"task": task, "model": model})
        for task, models in tried.items()
        for model in models
    )


def claims() -> tuple[Claim, ...]:
    far, near = "test_1024", "test_256"
    signs = [
        Claim(
            f"{mixer}: the sign decides",
            f"{mixer} follows parity to 16 times the training length with negative eigenvalues, and not without"
            " (Grazzi et al. 2024)",
            ((f"parity: {mixer}, negative", f"parity: {mixer}, positive"),),
            "more",
            MARGIN,
            far,
        )
        for mixer in SIGNED
    ]
    others = {
        "attention": "two layers of attention do not (Deletang et al. 2022)",
        "mlstm": "mLSTM does not (Beck et al. 2024)",
    }
    lost = [
        Claim(
            f"{mixer} loses parity",
            f"A delta step with a sign follows parity beyond the training length, {said}",
            (("parity: delta_net, negative", f"parity: {mixer}"),),
            "more",
            MARGIN,
            far,
        )
        for mixer, said in others.items()
    ]
    return (
        *signs,
        *lost,
        Claim("two reflections", "Two delta steps a letter track S3, one does not (Siems et al. 2025)",
              (("s3: gated_delta_product, 2 steps", "s3: gated_delta_product, 1 steps"),), "more", MARGIN, near),
        Claim("diagonal transitions commute", "Two delta steps track S3, a diagonal transition with a sign does not"
              " (Merrill et al. 2024)",
              (("s3: gated_delta_product, 2 steps", "s3: mamba2, negative"),), "more", MARGIN, near),
        Claim("RWKV-7 beyond one reflection", "RWKV-7's transition tracks S3 where one delta step does not"
              " (Peng et al. 2025)",
              (("s3: rwkv7", "s3: delta_net, negative"),), "more", MARGIN, near),
        Claim("memory mixing", "sLSTM, whose gates see its state, follows parity beyond the training length, mLSTM does"
              " not (Beck et al. 2024)",
              (("parity: slstm", "parity: mlstm"),), "more", MARGIN, far),
        Claim("rotations", "Two delta steps a letter track A5, whose elements are rotations of space and so two"
              " reflections each, one does not",
              (("a5: gated_delta_product, 2 steps", "a5: gated_delta_product, 1 steps"),), "more", MARGIN, near),
        Claim("constant depth", "At the training length a GRU tracks A5, two layers of attention do not (Merrill et al."
              " 2024)",
              (("a5: gru", "a5: attention"),), "more", MARGIN, "test"),
    )  # fmt: skip


class StateTracking(TrainedStudy):
    name = "state_tracking"
    title = "What follows a state?"
    question = (
        "Which recurrences name the state after every letter of a word, for words up to 64 times as long as any that"
        " they were trained on?"
    )
    versions: ClassVar[Mapping[str, Version]] = {
        "recorded": Version(
            COMMON,
            arms(TRIED),
            Protocol(rates=(-6, -5, -4), most_rates=6, tuning_seeds=(100, 101), reporting_seeds=(0, 1, 2, 3, 4)),
            claims(),
        ),
        "small": Version(
            f"{COMMON} train.steps=300 train.plateau_tokens=51200 'task.test_lengths=[128,256,1024]'",
            arms({"parity": ("delta_net, positive", "delta_net, negative")}),
            IN_MINUTES,
        ),
    }

    def answer(self, results: Results) -> str:
        answers = {decision.claim.name: decision.verdict.answer for decision in decide(results)}
        signs = [answers[f"{mixer}: the sign decides"] for mixer in SIGNED]
        return (
            f"Of {len(SIGNED)} recurrences, {signs.count('yes')} follow parity to 1024 letters with negative"
            f" eigenvalues and not without ({signs.count('no')} do not differ, {signs.count('unresolved')} are"
            f" unresolved). That two delta steps track S3 to 256 letters and one does not:"
            f" {answers['two reflections']}."
        )

    def figures(self, results: Results) -> Sequence[Figure]:
        return [
            Figure(
                "lengths",
                "Accuracy over all prefixes of a word against its length, at the rate that tuning chose: each reporting"
                " seed, and their medians joined. Trained on words of up to 64 letters (the dotted line). Dashed:"
                " eigenvalues in (0, 1) alone. Chance is grey.",
                lambda axes: draw_lengths(axes, results),
                columns=3,
                size=(16.2, 4.8),
            )
        ]

    def tables(self, results: Results) -> Sequence[Table]:
        header = ["arm", *(f"seeds that solve {length:,}" for length in LENGTHS), "accuracy at 1,024 (95 % interval)"]
        return [Table("Share of seeds solved", [header, *map(result_row, results.arms.values())])]


def split_of(length: int) -> str:
    return "test" if length == LENGTHS[0] else f"test_{length}"


def accuracy(run: RecordedRun, length: int) -> float | None:
    """Of a run at a length; ``None`` where it was not tested there."""
    items = run.items(split_of(length)) if run.finished else None
    return None if items is None else float(items.mean())


def result_row(progress: Progress) -> list[str]:
    """How many seeds solve each length, and the accuracy at 16 times the training length."""
    runs = [run for run in progress.reporting if run.finished]
    if len(runs) < 2:
        return [progress.arm.name, *[""] * (len(LENGTHS) + 1)]
    cells = []
    for length in LENGTHS:
        found = [value for run in runs if (value := accuracy(run, length)) is not None]
        solved, seeds = sum(value >= SOLVED for value in found), len(progress.reporting)
        share = share_interval(solved, seeds)
        cells.append(f"{solved} of {seeds} ({share.low:.0%} to {share.high:.0%})" if found else "")
    mean = mean_interval(scores_of(progress, Claim("", "", (), "more", 0.0, "test_1024")))
    whole = f"{mean.estimate:.3f} ({max(mean.low, 0):.3f} to {min(mean.high, 1):.3f})"
    return [progress.arm.name, *cells, whole]


def draw_lengths(panels: Sequence[Axes], results: Results) -> None:
    for axes, task in zip(panels, TASKS, strict=True):
        ends = []
        for progress in results.arms.values():
            runs = [run for run in progress.reporting if run.finished]
            if progress.arm.factors["task"] != task or not runs:
                continue
            model = progress.arm.factors["model"]
            points = [(length, values) for length in LENGTHS
                      if (values := [each for run in runs if (each := accuracy(run, length)) is not None])]  # fmt: skip
            line: dict[str, Any] = {"linestyle": DASHES.get(model.partition(", ")[2], "-")}
            style = plots.mixer_style(model.partition(",")[0])
            ends.append((model, style["color"], plots.draw_series(axes, points, style, **line)))
            if len(ends) == 1:
                plots.mark_chance(axes, runs[0])
        plots.label_lines(axes, ends)
        plots.logarithmic(axes, LENGTHS, lambda value: f"{value:,.0f}")
        axes.set_xlim(LENGTHS[0] / 1.2, LENGTHS[-1] * 1.2)  # of a panel without runs, too
        axes.axvline(LENGTHS[0], color="#999999", linestyle=(0, (1, 2)), linewidth=1.0)
        plots.shares(axes)
        axes.set_title(TITLES[task])
        axes.set_xlabel("Letters of the word (logarithmic)")
    panels[0].set_ylabel("Accuracy over all prefixes")
