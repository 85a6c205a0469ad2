"""Conversion: how much of a transformer's quality and recall is left in a sub-quadratic model that is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from matplotlib.axes import Axes

from experiments.report.statistics import Interval, Verdict, mean_interval, verdict
from experiments.runs.recorded import RecordedRun
from experiments.studies import plots
from experiments.studies.claims import decide, lacks
from experiments.studies.protocol import IN_MINUTES, Arm, Progress, Protocol
from experiments.studies.records import model_of
from experiments.studies.study import Figure, Table
from experiments.studies.trained import Claim, Learnt, Results, Version
from experiments.studies.trained_study import TrainedStudy
from experiments.studies.trained_tables import mean_text
from seqarch import LanguageModel
from seqarch.convert import changed_layers
from seqarch.convert.conversion import layers_of

COMMON = "experiment=conversion"
TEACHER = "attention"
TEACHER_STEPS, OUTPUT_STEPS = 1000, 100

MIXERS = ("gated_delta_net", "mamba2", "linear_attention", "sliding_window", "lolcats")
"""In every layer, in place of attention."""

KEPT = {"gated_delta_net, 1 in 4 kept": "3*gated_delta_net attention", "gated_delta_net, 1 in 2 kept":
        "gated_delta_net attention"}  # fmt: skip
"""Patterns that keep layers of attention."""

STEPS = 200
"""Of distillation by logits."""

BUDGETS = (50, 800)
"""Further numbers of them, of gated_delta_net in every layer."""

SCRATCH_STEPS = {
    **{"gated_delta_net": 1347, "mamba2": 1368, "linear_attention": 1443, "sliding_window": 1430, "lolcats": 1274},
    **{"gated_delta_net, 1 in 4 kept": 1335, "gated_delta_net, 1 in 2 kept": 1324},
    **{"gated_delta_net, 50 steps": 1147, "gated_delta_net, 800 steps": 2146},
}
"""Of the same model from nothing, with as many FLOPs as teacher and stages together have (:func:`work`)."""

MARGIN = 0.05
"""Of the digits: less would change nobody's choice of a model."""

BITS_MARGIN = 0.02
"""Of the bits per byte of text."""

LEARNT = Learnt("test", 0.5)
"""Of the digits; chance is 0.1."""


def model_said(model: str) -> str:
    """What makes the model of a student or of its rival, in the grammar of ``experiments.run``."""
    if model not in KEPT:
        return f"model={model}"
    name = model.replace(", ", "_").replace(" ", "_")
    return f"model=gated_delta_net model.name={name} 'model.pattern=\"{KEPT[model]}\"'"


def arms(
    models: Sequence[str] = (*MIXERS, *KEPT), budgets: Sequence[int] = BUDGETS, shorter: int = 1
) -> tuple[Arm, ...]:
    """The teacher; of each model its two stages; and the same model from nothing. In steps fewer by this factor."""
    teacher = f"model=attention train.steps={TEACHER_STEPS // shorter}"
    found = [Arm(TEACHER, teacher, {"model": TEACHER, "way": "teacher"})]
    for model in models:
        said = model_said(model)
        outputs = f"{said} train.convert=whole train.objective=mixer_outputs train.weight_decay=0"
        outputs += _steps(OUTPUT_STEPS // shorter)
        found.append(Arm(f"{model}: outputs", outputs, {"model": model, "way": "outputs"}, TEACHER, TEACHER))
        for steps in (STEPS, *(budgets if model == MIXERS[0] else ())):
            name = model if steps == STEPS else f"{model}, {steps} steps"
            distilled = f"{said} train.objective=logits{_steps(steps // shorter)}"
            scratch = f"{said} train.steps={SCRATCH_STEPS[name] // shorter}"
            ways: list[tuple[str, str, str | None, str | None]] = [
                ("distilled", distilled, f"{model}: outputs", TEACHER), ("from scratch", scratch, None, None)
            ]  # fmt: skip
            found += [Arm(f"{name}: {way}", overrides, {"model": model, "steps": str(steps), "way": way}, *sources)
                      for way, overrides, *sources in ways]  # fmt: skip
    return tuple(found)


def _steps(count: int) -> str:
    return f" train.steps={count} train.warmup={count // 5} train.eval_every={count}"


def claims(models: Sequence[str] = (*MIXERS, *KEPT)) -> tuple[Claim, ...]:
    recall = [
        Claim(f"{model} keeps recall", f"{model}, distilled, recalls as many digits as the transformer that it is"
              " made of",
              ((f"{model}: distilled", TEACHER),), "equal", MARGIN)
        for model in models
    ]  # fmt: skip
    rivals = [
        Claim(f"{model} gains by conversion", f"{model}, distilled, recalls more digits than the same model trained"
              " from nothing with as many FLOPs as teacher and stages together (expected before the runs)",
              ((f"{model}: distilled", f"{model}: from scratch"),), "more", MARGIN)
        for model in models
    ]  # fmt: skip
    return (*recall, *rivals)


def work(teacher: LanguageModel, student: LanguageModel, objective: str, length: int) -> int:
    """FLOPs of a step of training by one sequence: three forward passes of what learns, and what the teacher takes."""
    if objective == "targets":
        return 3 * student.flops(length)
    if objective == "logits":
        return teacher.flops(length) + 3 * student.flops(length)
    changed = changed_layers(teacher, student)
    theirs, own = ([mixer for i in changed for mixer in layers_of(model)[i].mixers] for model in (teacher, student))
    taught: Any = sum(mixer.flops(length) for mixer in theirs)  # type: ignore[operator]
    learnt: Any = sum(mixer.flops(length) for mixer in own)  # type: ignore[operator]
    return teacher.flops(length) + taught + 3 * learnt


def equal_steps(teacher: LanguageModel, student: LanguageModel, length: int, steps: int) -> int:
    """Steps of a student from nothing that take as many FLOPs as those of its teacher, of outputs and of logits."""
    total = TEACHER_STEPS * work(teacher, teacher, "targets", length)
    total += OUTPUT_STEPS * work(teacher, student, "mixer_outputs", length)
    total += steps * work(teacher, student, "logits", length)
    return round(total / work(teacher, student, "targets", length))


@dataclass(frozen=True)
class Bits:
    """The bits per byte of text of an arm, over those of the transformer, less one, by paired seeds."""

    arm: str
    excess: Interval
    verdict: Verdict


def bits_of(progress: Progress) -> np.ndarray:
    """Of each reporting seed that finished, the bits per byte of the test texts."""
    return np.array([run.record["results"]["test_bits_per_byte"] for run in progress.reporting if run.finished])


def excesses(results: Results) -> list[Bits]:
    """Of each arm that was distilled or trained from nothing, as soon as two seeds are there."""
    teacher, found = results.arms[TEACHER], []
    for name, progress in results.arms.items():
        ours, theirs = bits_of(progress), bits_of(teacher)
        if progress.arm.factors["way"] not in ("distilled", "from scratch") or len(ours) < 2:
            continue
        lacking = [*lacks(teacher), *lacks(progress)]
        if len(ours) != len(theirs):
            lacking.append("other seeds have finished of the two")
            ours, theirs = (each[: min(len(ours), len(theirs))] for each in (ours, theirs))
        interval = mean_interval((ours / theirs - 1)[:, None])
        found.append(Bits(name, interval, verdict(interval, BITS_MARGIN, "equal", lacking)))
    return found


class Conversion(TrainedStudy):
    name = "conversion"
    title = "How much of a transformer is left after its conversion?"
    question = (
        "A transformer on text that recalls a number hidden in it is converted to sub-quadratic mixers and distilled."
        " What is left of its quality and of its recall, by the mixer, by the share of layers that keep attention, and"
        " by the tokens of distillation, and is that more than the same model has from nothing, for as much work?"
    )
    versions: ClassVar[Mapping[str, Version]] = {
        "recorded": Version(
            COMMON,
            arms(),
            Protocol(rates=(-6, -5, -4), most_rates=5, tuning_seeds=(100,), fixed_budget=True),
            claims(),
            LEARNT,
        ),
        "small": Version(
            f"{COMMON} task.length=64 task.test_lengths=[128] train.batch_size=8 train.warmup=2 train.eval_every=25",
            arms(("gated_delta_net",), (), shorter=20),
            replace(IN_MINUTES, fixed_budget=True),
            claims(("gated_delta_net",)),
        ),
    }

    def answer(self, results: Results) -> str:
        answers = {decision.claim.name: decision.verdict.answer for decision in decide(results)}
        models = list(dict.fromkeys(name.rsplit(" keeps ")[0] for name in answers if " keeps " in name))
        kept = [f"{model} {answers[f'{model} keeps recall']}" for model in models]
        gained = [f"{model} {answers[f'{model} gains by conversion']}" for model in models]
        bits = [f"{each.arm.partition(':')[0]} {each.verdict.answer}" for each in excesses(results)
                if each.arm.endswith("distilled")]  # fmt: skip
        return (
            f"Recall within {MARGIN:g} of the transformer's: {', '.join(kept)}; more recall than from nothing for as"
            f" much work: {', '.join(gained)}; bits per byte within {BITS_MARGIN:.0%} of the transformer's:"
            f" {', '.join(bits) or 'none is trained yet'}."
        )

    def figures(self, results: Results) -> Sequence[Figure]:
        return [
            Figure(
                "recall",
                "Share of digits that are right, each reporting seed: as the new mixers stand after the first stage"
                " (outputs), after distillation, and of the same model from nothing with as many FLOPs in all. The"
                " dashed line is the median of the transformer, chance is 0.1.",
                partial(draw_ways, results=results, of=recall_of, label="Digits that are right"),
                size=(9.6, 4.6),
            ),
            Figure(
                "bits",
                "Bits per byte of the text around, in the same order; less is better.",
                partial(draw_ways, results=results, of=bits_of_run, label="Bits per byte of text"),
                size=(9.6, 4.6),
            ),
        ]

    def tables(self, results: Results) -> Sequence[Table]:
        rows = [["arm", f"bits per byte over the transformer's (95 % interval), margin {BITS_MARGIN:.0%}", "verdict"]]
        for each in excesses(results):
            low, middle, high = each.excess.low, each.excess.estimate, each.excess.high
            said = each.verdict.answer
            said = f"{said}: {each.verdict.reason}" if said == "unresolved" else f"**{said}**"
            rows.append([each.arm, f"{middle:+.1%} ({low:+.1%} to {high:+.1%})", said])
        scores = [["arm", "digits right (95 % interval)", "bits per byte", "steps", "FLOPs of these steps"]]
        scores += [_scores(progress, results) for progress in results.arms.values()]
        return [Table("Quality", rows), Table("Recall, quality and work", scores)]


def recall_of(run: RecordedRun) -> float:
    return run.result("test")


def bits_of_run(run: RecordedRun) -> float:
    return run.record["results"]["test_bits_per_byte"]


def _scores(progress: Progress, results: Results) -> list[str]:
    runs = [run for run in progress.reporting if run.finished]
    if not runs:
        return [progress.arm.name, "", "", "", ""]
    teachers = [run for run in results.arms[TEACHER].reporting if run.finished]
    train, length = runs[0].config["train"], runs[0].config["task"]["length"]
    models = [model_of(run) for run in (teachers or runs)[:1] + runs[:1]]
    flops = work(models[0], models[1], train.get("objective", "targets"), length) * train["batch_size"] * train["steps"]
    return [progress.arm.name, mean_text(progress, "test"), f"{np.mean(bits_of(progress)):.3f}",
            f"{train['steps']:,}", f"{flops:.3g}"]  # fmt: skip


def draw_ways(panels: Sequence[Axes], results: Results, of: Any, label: str) -> None:
    """The seeds of every arm but the teacher's, model by model, in the style of the mixer."""
    axes = panels[0]
    shown = [each for each in results.arms.values() if each.arm.factors["way"] != "teacher"]
    for x, progress in enumerate(shown):
        runs = [run for run in progress.reporting if run.finished]
        if runs:
            style = plots.mixer_style(progress.arm.factors["model"].partition(",")[0])
            plots.draw_seeds(axes, x, [of(run) for run in runs], style, size=7)
    teachers = [of(run) for run in results.arms[TEACHER].reporting if run.finished]
    if teachers:
        axes.axhline(float(np.median(teachers)), color="#767676", linestyle=(0, (5, 1.5)), linewidth=1.2, zorder=1)
    axes.set_xticks(range(len(shown)), [each.arm.name for each in shown], rotation=40, ha="right", fontsize=7)
    axes.set_ylabel(label)
