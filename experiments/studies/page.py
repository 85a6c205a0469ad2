"""The generated parts of a study's page, from its recorded runs alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from experiments.runs.recorded import RecordedRun
from experiments.studies import STUDIES, plan, records
from experiments.studies.claims import decide
from experiments.studies.study import Figure, Results, Study, Version
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
    found = cache(lambda: read(version, root / name))
    return {"results": lambda: results(study, found(), name), "runs": lambda: how_to_run(study, found())}


def read(version: Version, folder: Path) -> Results:
    """The recorded runs of a version.

    Raises:
        RunnerError: there are none, or its plan was edited after its first run.
    """
    found = Results(version, records.read(folder))
    plan.check(version, folder)
    return found


def results(study: Study, found: Results, folder: str = "") -> str:
    """Question, answer, verdicts, plots and tables.

    Args:
        folder: of the plots, from the page.
    """
    parts = [f"**Question.** {study.question}", *_unfinished(found), f"**Answer.** {study.answer(found)}", verdicts(found)]
    parts += [_figure(figure, folder) for figure in study.figures(found)]
    for each in (*study.tables(found), training(found)):
        header, *rows = each.rows
        parts.append(f"**{each.title}**\n\n{table(header, rows, align='---:')}")
    return "\n\n".join([*parts, *_failures(found.runs)])
