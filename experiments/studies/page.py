"""The generated parts of a study's page, from its recorded runs alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from experiments.runs.recorded import RecordedRun
from experiments.studies import STUDIES
from experiments.studies.records import FILE
from experiments.studies.study import Figure, Runs, Study
from experiments.util.blocks import table
from experiments.util.paths import ROOT

RESULTS = Path("docs/results")
PAGES = {name: RESULTS / f"{name}.md" for name in STUDIES}


def blocks(name: str) -> dict[str, Callable[[], str]]:
    """The makers of the generated blocks of a study's page."""
    study = STUDIES[name]
    if missing := study.missing(ROOT / RESULTS):
        return {"results": lambda: not_run(missing), "runs": lambda: "\n\n".join(commands(study))}
    runs = cache(lambda: study.read(ROOT / RESULTS))
    return {
        "results": lambda: results(study, runs()),
        "runs": lambda: how_to_run(study, runs()),
    }


def results(study: Study, runs: Runs, folder: str | None = None) -> str:
    """The verdicts, the plots and the tables."""
    parts = [verdicts(study, runs)]
    parts += [_figure(figure, study.name if folder is None else folder) for figure in study.figures(runs)]
    for each in study.tables(runs):
        header, *rows = each.rows
        parts.append(f"**{each.title}**\n\n{table(header, rows, align='---:')}")
    return "\n\n".join([*parts, *_failures(runs)])


def not_run(missing: Sequence[str]) -> str:
    return f"**Not run yet**: no runs of {', '.join(missing)} are recorded, so there is nothing to show."


def verdicts(study: Study, runs: Runs) -> str:
    rows = [(finding.said, finding.seen, "yes" if finding.holds else "**no**") for finding in study.findings(runs)]
    return table(("said", "seen here", "agrees"), rows)


def _figure(figure: Figure, folder: str) -> str:
    return f"![{figure.name}]({folder + '/' if folder else ''}{figure.name}.png)\n\n*{figure.caption}*"


def _failures(runs: Runs) -> list[str]:
    failed = [run for run in runs.all if not run.finished]
    if not failed:
        return ["No run failed."]
    lines = [f"- {run.path}, rate {run.config['train']['lr']:g}: {run.record.get('reason', run.ending)}"
            for run in failed]  # fmt: skip
    return [f"**Failed runs: {len(failed)} of {len(runs.all)}**\n\n" + "\n".join(lines)]


def how_to_run(study: Study, runs: Runs) -> str:
    """The commands, and where and by which code the recorded runs were made."""
    seconds = sum(run.record["cost"]["processor_seconds"] for run in runs.all if "cost" in run.record)
    files = ", ".join(f"[{name}]({name}/{FILE})" for name in runs.by_study)
    spent = f"{seconds / 60:.0f} minutes of processor time in training steps"
    recorded = f"Recorded, a line per run: {files}; {len(runs.all)} runs, {spent}."
    return "\n\n".join([*commands(study), recorded, "\n".join(_machines(runs.all))])


def commands(study: Study) -> list[str]:
    """The commands that train, draw and write the page, in its sizes."""
    own = f"python -m experiments.study {study.name}"
    made_by = "\n".join([*(f"python -m experiments.study {name}" for name in study.uses), own])
    parts = [
        f"From nothing, this trains what is missing, then draws and writes this page:\n\n```sh\n{made_by}\n```",
        f"From the committed records alone, offline: `{own} --draw`. {_small(study)}",
    ]
    if "large" in study.sweeps:
        count = len(list(study.sweeps["large"].arguments()))
        parts.append(f"For a GPU, {count} runs, **not run yet**: `{own} --version large`.")
    return parts


def _small(study: Study) -> str:
    if not study.sweeps:
        return "A small version draws from those of the other studies: `make results-small`."
    count = len(list(study.sweeps["small"].arguments()))
    return f"Small, {count} runs: `python -m experiments.study {study.name} --version small`."


def _machines(runs: list[RecordedRun]) -> list[str]:
    """The machines and versions of the code, with the number of runs that each made."""
    counts = Counter(_machine(run) for run in runs if "hardware" in run.record)
    return [f"- {number} runs: {text}" for text, number in sorted(counts.items())]


def _machine(run: RecordedRun) -> str:
    hardware, software = run.record["hardware"], run.record["environment"]
    versions = f"Python {software['python']}, torch {software['torch']}"
    threads = f"{hardware['threads']} thread{'' if hardware['threads'] == 1 else 's'}"
    return f"{run.device}, {threads} per run; {versions}; code {run.commit}"
