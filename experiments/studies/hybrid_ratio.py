"""Hybrids: how many layers of attention, and where, a stack of recurrences needs to recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from matplotlib.axes import Axes

from experiments.studies import plots
from experiments.studies.claims import decide
from experiments.studies.protocol import IN_MINUTES, LONG_RUNS, Arm, Progress
from experiments.studies.recall_state import BY_LENGTH, BY_PAIRS, LEARNT, MOST
from experiments.studies.study import Figure, Table
from experiments.studies.trained import Claim, Results, Version
from experiments.studies.trained_study import TrainedStudy
from experiments.studies.trained_tables import mean_text, not_learnt_text, so_text

COMMON = "experiment=hybrid_ratio match.parameters=300k match.count=layers match.tolerance=3%"
"""The channel mixers' widths are solved for these parameters in the eight layers."""

LAYERS = 8
COUNTS = (1, 2, 4)
"""Layers of attention of a hybrid."""

PLACES = ("before", "behind")
"""Where attention stands: before or behind the recurrences of each of as many equal parts of the stack."""

RECURRENCES = ("mamba2", "gated_delta_net")

SPLITS = {
    "64 in 256 tokens": BY_PAIRS[64],
    "64 in 4,096": BY_LENGTH[4096],
    "256 in 1,024": BY_PAIRS[256],
    "256 in 4,096": MOST,
}
"""Pairs that are recalled, as in training, farther, more, and both."""

MARGIN = 0.05
"""Of recall accuracy: less would change nobody's choice of a model."""

DASHES: dict[str, Any] = {"before": (0, (4, 2)), "behind": "-"}


def named(recurrence: str, count: int, place: str = "behind") -> str:
    """The arm with so many layers of attention of eight."""
    if count == LAYERS:
        return "attention"
    return f"{recurrence}, {count} of {LAYERS} {place}" if count else f"{recurrence} alone"


def pattern(recurrence: str, count: int, place: str) -> str:
    """The layers of a hybrid: ``3*mamba2 attention`` is two of eight, behind."""
    others = LAYERS // count - 1
    own = f"{others}*{recurrence}"
    return f"attention {own}" if place == "before" else f"{own} attention"


def overrides(recurrence: str, count: int, place: str) -> str:
    """Of a hybrid, with a name of its own for its runs."""
    name = f"{recurrence}_{count}_{place}"
    return f"model=attention model.name={name} 'model.pattern=\"{pattern(recurrence, count, place)}\"'"


def arms(recurrences: Sequence[str] = RECURRENCES, counts: Sequence[int] = COUNTS) -> tuple[Arm, ...]:
    found = [Arm("attention", "model=attention", {"recurrence": "", "count": f"{LAYERS}", "place": ""})]
    for recurrence in recurrences:
        alone = {"recurrence": recurrence, "count": "0", "place": ""}
        found.append(Arm(named(recurrence, 0), f"model={recurrence}", alone))
        found += [
            Arm(named(recurrence, count, place), overrides(recurrence, count, place),
                {"recurrence": recurrence, "count": f"{count}", "place": place})
            for count in counts for place in PLACES
        ]  # fmt: skip
    return tuple(found)


def claims() -> tuple[Claim, ...]:
    most, found = BY_PAIRS[256], []
    for mixer in RECURRENCES:
        one, half = named(mixer, 1), named(mixer, 4)
        behind = tuple((named(mixer, count), named(mixer, count, "before")) for count in COUNTS)
        found += [
            Claim(f"{mixer}: one layer helps", "One layer of attention of eight, the last, recalls more of 256 pairs"
                  f" than {mixer} alone (Waleffe et al. 2024)", ((one, named(mixer, 0)),), "more", MARGIN, most),
            Claim(f"{mixer}: one layer is enough", "and no less than attention in all layers (expected before the"
                  " runs)", ((one, "attention"),), "more", -MARGIN, most),
            Claim(f"{mixer}: four are better", f"Four layers of attention beside {mixer} recall more of them than one"
                  " does (Lieber et al. 2024 find one in eight enough)", ((half, one),), "more", MARGIN, most),
            Claim(f"{mixer}: far away, too", "In 4096 tokens, 16 times as long as in training, one layer of attention"
                  f" recalls more of 64 pairs than {mixer} alone (expected before the runs)",
                  ((one, named(mixer, 0)),), "more", MARGIN, BY_LENGTH[4096]),
            Claim(f"{mixer}: the place", f"Attention behind {mixer} recalls more of 256 pairs than before it, over one,"
                  " two and four layers (expected before the runs)", behind, "more", MARGIN, most),
        ]  # fmt: skip
    return tuple(found)


class HybridRatio(TrainedStudy):
    name = "hybrid_ratio"
    title = "How much attention does a hybrid need?"
    question = (
        "Of eight layers, how many have to be attention, and where, for a model to recall as much as one with attention"
        " in all of them, beside two recurrences?"
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
            f"{COMMON} task.vocab_size=256 'task.train_on=[{{length: 64, pairs: 4}}]' task.length=64 task.pairs=4"
            " task.test_examples=16 'task.test_on=[{length: 256, pairs: 64}]' train.steps=60 train.plateau_tokens=30720"
            " match.parameters=250k",
            arms(("gated_delta_net",), (1,)),
            IN_MINUTES,
        ),
    }  # fmt: skip

    def answer(self, results: Results) -> str:
        answers = {decision.claim.name: decision.verdict.answer for decision in decide(results)}
        said = [
            f"beside {mixer} that one layer of eight recalls as much of 256 pairs as eight is"
            f" {so_text(answers.get(f'{mixer}: one layer is enough'))}, and that it stands better behind"
            f" {so_text(answers.get(f'{mixer}: the place'))}"
            for mixer in RECURRENCES
        ]
        first, *others = said
        return "; ".join([first[0].upper() + first[1:], *others]) + f".{not_learnt_text(results)}"

    def figures(self, results: Results) -> Sequence[Figure]:
        return [
            Figure(
                "ratio",
                "Recall against the layers of attention of eight: each reporting seed, and their medians joined. A"
                " panel is a number of pairs in a length; the first is as in training. Solid: attention behind the"
                " recurrences of each part of the stack, dashed: before them. Chance is grey.",
                partial(draw_ratios, results=results),
                columns=2,
                rows=2,
                size=(12.6, 8.6),
            )
        ]

    def tables(self, results: Results) -> Sequence[Table]:
        rows = [["arm", *SPLITS]]
        rows += [[progress.arm.name, *(mean_text(progress, split) for split in SPLITS.values())]
                 for progress in results.arms.values()]  # fmt: skip
        return [Table("Recall of so many pairs: mean (95 % interval)", rows)]


def draw_ratios(panels: Sequence[Axes], results: Results) -> None:
    for axes, (said, split) in zip(panels, SPLITS.items(), strict=True):
        draw_ratio(axes, results, split)
        axes.set_title(f"{said} tokens" if "tokens" not in said else said)
    for axes in panels[2:]:
        axes.set_xlabel(f"Layers of attention of {LAYERS}")
    for axes in panels[::2]:
        axes.set_ylabel("Recall")


def draw_ratio(axes: Axes, results: Results, split: str) -> None:
    plots.shares(axes)
    axes.set_xticks([0, *COUNTS, LAYERS])
    axes.set_xlim(-0.3, LAYERS + 0.3)
    everything = scores(results.arms["attention"], split) if "attention" in results.arms else []
    ends = []
    for recurrence in RECURRENCES:
        for place in PLACES:
            names = [(0, named(recurrence, 0)), *((count, named(recurrence, count, place)) for count in COUNTS)]
            points = [(count, values) for count, name in names
                      if name in results.arms and (values := scores(results.arms[name], split))]  # fmt: skip
            points += [(LAYERS, everything)] if everything and points else []
            if points:
                style = plots.mixer_style(recurrence)
                ends.append(
                    (recurrence, style["color"], plots.draw_series(axes, points, style, linestyle=DASHES[place]))
                )
    finished = [run for progress in results.arms.values() for run in progress.reporting if run.finished]
    if finished:
        plots.mark_chance(axes, finished[0])
    # Both lines of a recurrence end at attention in all layers.
    plots.label_lines(axes, list({name: (name, colour, end) for name, colour, end in ends}.values()))


def scores(progress: Progress, split: str) -> list[float]:
    """The recall of each finished reporting run."""
    items = [run.items(split) for run in progress.reporting if run.finished]
    return [float(each.mean()) for each in items if each is not None]
