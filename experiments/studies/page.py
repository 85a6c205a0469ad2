"""The generated parts of a study's page, from its records alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from experiments.studies import STUDIES, plan, records
from experiments.studies.study import Figure, Planned, Study, Table
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


def recorded(study: Study[Any, Any], version: Planned, folder: Path) -> Any:
    """What a study has on record: the runs of a version, or what it has measured.

    Raises:
        RunnerError: there is nothing, or its plan was edited after its first line.
    """
    found = study.read(version, folder)
    plan.check(version, folder)
    plan.check_records(version, study.plans(found), folder / records.FILE)
    return found


def results(study: Study[Any, Any], found: Any, folder: str = "") -> str:
    """Question, answer, verdicts, plots and tables.

    Args:
        folder: of the plots, from the page.
    """
    said = study.verdicts(found)
    parts = [
        f"**Question.** {study.question}",
        *study.unfinished(found),
        f"**Answer.** {study.answer(found)}",
        table(*_split(said)),
        *_note(said),
        *(_figure(figure, folder) for figure in study.figures(found)),
        *(_titled(each) for each in study.tables(found)),
        *(each if isinstance(each, str) else _titled(each) for each in study.made(found)),
    ]
    return "\n\n".join(parts)


def _titled(each: Table) -> str:
    return "\n\n".join([f"**{each.title}**", table(*_split(each), align="---:"), *_note(each)])


def _split(rows: Table) -> tuple[list[str], list[list[str]]]:
    header, *body = rows.rows
    return header, body


def _note(each: Table) -> Sequence[str]:
    return [f"*{each.note}*"] if each.note else []


def _figure(figure: Figure, folder: str) -> str:
    return f"![{figure.name}]({folder + '/' if folder else ''}{figure.name}.png)\n\n*{figure.caption}*"


def how_to_run(study: Study[Any, Any], found: Any) -> str:
    """The commands, the plan, and where and by which code the records were made."""
    return "\n\n".join([commands(study), *study.provenance(found)])


def commands(study: Study[Any, Any]) -> str:
    """The commands that train or measure, draw and write the page, in its sizes."""
    own = f"python -m experiments.study {study.name}"
    parts = [
        f"This {study.does} what is not on record yet, then draws and writes this page; to begin from nothing, in"
        f" another folder: `--results FOLDER`.\n\n```sh\n{own}\n```",
        f"From the committed records alone, offline: `{own} --draw`. Small, in minutes: `{own} --version small`.",
    ]
    if "large" in study.versions:
        parts.append(f"For a GPU, **not run yet**: `{own} --version large`.")
    return "\n\n".join(parts)
