"""The generated parts of a study's page, from its recorded runs alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from experiments.report.comparison import listed
from experiments.report.figures import bytes_text
from experiments.runs.recorded import RecordedRun
from experiments.studies import STUDIES, plan, records
from experiments.studies.claims import Decision, adjusted, bonferroni, decide
from experiments.studies.protocol import Progress, rate_of
from experiments.studies.study import Claim, Figure, MeasuredStudy, Results, Study, Table, Version
from experiments.util.blocks import table
from experiments.util.paths import ROOT

RESULTS = Path("docs/results")
PAGES = {name: RESULTS / f"{name}.md" for name in STUDIES}


def blocks(name: str) -> dict[str, Callable[[], str]]:
    """The makers of the generated blocks of a published page."""
    study, root = STUDIES[name], ROOT / RESULTS
    version = study.versions["recorded"]
    if not (root / name / records.FILE).exists():
        return {"results": lambda: "**Not run yet**: no runs are recorded.", "runs": lambda: commands(study)}
    found = cache(lambda: recorded(study, version, root / name))
    return {"results": lambda: results(study, found(), name), "runs": lambda: how_to_run(study, found())}


def recorded(study: Study, version: Version, folder: Path) -> Any:
    """What a study has on record: the runs of a version, or what it has measured.

    Raises:
        RunnerError: there is nothing, or its plan was edited after its first line.
    """
    if not isinstance(study, MeasuredStudy):
        return read(version, folder)
    found = study.read(version, folder)
    plan.check(version, folder)
    return found


def read(version: Version, folder: Path) -> Results:
    """The recorded runs of a version.

    Raises:
        RunnerError: there are none, or its plan was edited after its first run.
    """
    found = Results(version, records.read(folder))
    plan.check(version, folder)
    plan.check_records(version, found.runs, folder / records.FILE)
    return found


def results(study: Study, found: Any, folder: str = "") -> str:
    """Question, answer, verdicts, plots and tables.

    Args:
        folder: of the plots, from the page.
    """
    measured = isinstance(study, MeasuredStudy)
    parts = [
        f"**Question.** {study.question}",
        *(study.unfinished(found) if measured else _unfinished(found)),
        f"**Answer.** {study.answer(found)}",
        table(*_split(study.verdicts(found))) if measured else verdicts(found),
    ]
    parts += [_figure(figure, folder) for figure in study.figures(found)]
    for each in (*study.tables(found), *([] if measured else [training(found)])):
        parts.append(f"**{each.title}**\n\n{table(*_split(each), align='---:')}")
    return "\n\n".join([*parts, *([] if measured else _failures(found.runs))])


def _split(rows: Table) -> tuple[list[str], list[list[str]]]:
    header, *body = rows.rows
    return header, body


def verdicts(found: Results) -> str:
    """A row for every claim: what is said, by how much it is so here, and the verdict."""
    decisions, changed = decide(found), bonferroni(found)
    rows = [
        (decision.claim.said, _margin(decision.claim), _seen(decision, p_value), _answer(decision))
        for decision, p_value in zip(decisions, adjusted(decisions), strict=True)
    ]
    said = f"Each interval is of 95 %, and there are {len(rows)} claims."
    if any(decision.verdict.answer != "unresolved" for decision in decisions):
        said += (
            " With Bonferroni's correction these verdicts would be unresolved: " + (", ".join(changed) or "none") + "."
        )
    return table(("claim", "margin", "difference seen (95 % interval)", "verdict"), rows) + f"\n\n*{said}*"


def _margin(claim: Claim) -> str:
    sign = "> " if claim.kind == "more" else "± "
    return f"{sign}{2**claim.margin:g} times" if claim.threshold is not None else f"{sign}{claim.margin:g}"


def _seen(decision: Decision, p_value: float | None) -> str:
    if (interval := decision.interval) is None:
        return ""
    ends = (interval.estimate, interval.low, interval.high)
    if decision.claim.threshold is not None:
        middle, low, high = (f"{2**end:.2g}" for end in ends)
        return f"{middle} times the steps ({low} to {high})"
    middle, low, high = (f"{end:+.3f}" for end in ends)
    tested = "" if p_value is None else f"; sign flips against no difference p = {p_value:.2g} (Holm)"
    return f"{middle} ({low} to {high}){tested}"


def _answer(decision: Decision) -> str:
    if decision.verdict.answer != "unresolved":
        return f"**{decision.verdict.answer}**"
    first, *others = decision.verdict.reason.split("; ")
    return f"unresolved: {first}" + (f"; {len(others)} more" if others else "")


def training(found: Results) -> Table:
    """How each arm was tuned, and what twice its budget gained."""
    header = ["arm", "rate, of those tried", "steps", "stable phase ended by", "twice the budget gains", "parameters",
              "state", "processor time"]  # fmt: skip
    return Table("Tuning and convergence", [header, *(_training_row(each) for each in found.arms.values())])


def _training_row(progress: Progress) -> list[str]:
    name, tried = progress.arm.name, listed([rate_of(rate) for rate in progress.rates])
    runs = [run for run in progress.reporting if run.finished]
    if progress.chosen is None or not runs:
        return [name, f"none yet of {tried}", "", "", "", "", "", ""]
    endings = Counter(run.record["results"].get("stable_phase", {}).get("ending", "its steps") for run in runs)
    gained, model = progress.gained(), runs[0].record["model"]
    steps = [run.record["cost"]["steps"] for run in runs]
    return [
        name,
        f"{progress.chosen:g} of {tried}" + (", **at the edge**" if progress.at_edge else ""),
        f"{statistics.median(steps):,.0f}",
        ", ".join(f"{ending} {number}" for ending, number in sorted(endings.items())),
        "" if gained is None else f"{gained:+.3f}" + ("" if progress.converged else ", **not converged**"),
        f"{model['parameters']:,}",
        bytes_text(model["state_bytes"]),
        f"{statistics.median(run.record['cost']['processor_seconds'] for run in runs):.0f} s",
    ]


def _unfinished(found: Results) -> list[str]:
    """A sentence where runs are missing."""
    done = sum(not progress.wanted() for progress in found.arms.values())
    if done == len(found.arms):
        return []
    return [f"**In progress**: {done} of {len(found.arms)} arms are done; the others are unresolved until they are."]


def _figure(figure: Figure, folder: str) -> str:
    return f"![{figure.name}]({folder + '/' if folder else ''}{figure.name}.png)\n\n*{figure.caption}*"


def _failures(runs: Sequence[RecordedRun]) -> list[str]:
    failed = [run for run in runs if not run.finished]
    if not failed:
        return ["No run failed."]
    lines = [f"- {run.record['study']['arm']}, {run.record['study']['stage']}, rate {run.config['train']['lr']:g}, seed"
             f" {run.config['seed']}: {run.record.get('reason', run.ending)}" for run in failed]  # fmt: skip
    return [f"**Failed runs: {len(failed)} of {len(runs)}**\n\n" + "\n".join(lines)]


def how_to_run(study: Study, found: Any) -> str:
    """The commands, the plan, and where and by which code the recorded runs were made."""
    if isinstance(study, MeasuredStudy):
        lines = (
            f"Recorded, a line per round: [{records.FILE}]({study.name}/{records.FILE}); its margins were committed"
            f" before in [{plan.FILE}]({study.name}/{plan.FILE}), whose hash every line has."
        )
        return "\n\n".join([commands(study), lines, study.provenance(found)])
    seconds = sum(run.record["cost"]["processor_seconds"] for run in found.runs if "cost" in run.record)
    stages = Counter(run.record["study"]["stage"] for run in found.runs)
    counted = ", ".join(f"{number} for {stage}" for stage, number in stages.items())
    recorded = (
        f"Recorded, a line per run: [{records.FILE}]({study.name}/{records.FILE}); {len(found.runs)} runs ({counted}),"
        f" {seconds / 3600:.1f} hours of processor time in training steps. Margins and grids were committed before,"
        f" in [{plan.FILE}]({study.name}/{plan.FILE}), whose hash every line has."
    )
    return "\n\n".join([commands(study), recorded, "\n".join(_machines(found.runs))])


def commands(study: Study) -> str:
    """The commands that train, draw and write the page, in its sizes."""
    own = f"python -m experiments.study {study.name}"
    does = "measures" if isinstance(study, MeasuredStudy) else "trains"
    parts = [
        f"This {does} what is not on record yet, then draws and writes this page; to begin from nothing, in another"
        f" folder: `--results FOLDER`.\n\n```sh\n{own}\n```",
        f"From the committed records alone, offline: `{own} --draw`. Small, in minutes: `{own} --version small`.",
    ]
    if "large" in study.versions:
        parts.append(f"For a GPU, **not run yet**: `{own} --version large`.")
    return "\n\n".join(parts)


def _machines(runs: Sequence[RecordedRun]) -> list[str]:
    """The machines and versions of the code, with the number of runs that each made."""
    counts = Counter(_machine(run) for run in runs if "hardware" in run.record)
    return [f"- {number} runs: {text}" for text, number in sorted(counts.items())]


def _machine(run: RecordedRun) -> str:
    hardware, software = run.record["hardware"], run.record["environment"]
    versions = f"Python {software['python']}, torch {software['torch']}"
    threads = f"{hardware['threads']} thread{'' if hardware['threads'] == 1 else 's'}"
    return f"{run.device}, {threads} per run; {versions}; code {run.commit}"
