"""From a study to its results: trains what is missing, writes the records, draws the figures, writes the page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from experiments.studies import plan, records
from experiments.studies.page import PAGES, RESULTS, blocks, how_to_run, recorded, results
from experiments.studies.study import Planned, Study
from experiments.util import owned
from experiments.util.blocks import fill
from experiments.util.errors import RunnerError, choices_hint, writing
from experiments.util.files import write_atomic
from experiments.util.paths import ROOT
from experiments.util.plot_style import figure


def train_and_record(study: Study[Any, Any], version: str, root: Path, runs: Path, jobs: int) -> int:
    """Train a version's missing runs and record them below ``root``; the exit code.

    Raises:
        RunnerError: there is no such version, or its plan was edited after its first run.
    """
    folder = write_plan(study, version, root).parent
    if root == ROOT / RESULTS:
        plan.check_committed(folder)
    return study.complete(version_of(study, version), folder, runs, jobs)


def write_plan(study: Study[Any, Any], version: str, root: Path) -> Path:
    """Write the plan of a version below ``root``; where.

    Raises:
        RunnerError: there is no such version, or the plan was edited after its first run.
    """
    folder = own_folder(study, root)
    plan.settle(version_of(study, version), folder, recorded=(folder / records.FILE).exists())
    return folder / plan.FILE


def version_of(study: Study[Any, Any], version: str) -> Planned:
    """A study at one size.

    Raises:
        RunnerError: it has no such version.
    """
    if version not in study.versions:
        raise RunnerError(f"{study.name} has no version {version!r}, {choices_hint(version, study.versions)}")
    return study.versions[version]


def own_folder(study: Study[Any, Any], root: Path) -> Path:
    """The folder of a study's files below ``root``.

    Raises:
        StorageError: it cannot be made, or holds what no study wrote.
    """
    folder = root / study.name
    if root == ROOT / RESULTS:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    else:
        owned.settle(folder, "study", partial(_is_study, name=study.name))
    return folder


def _is_study(folder: Path, name: str) -> bool:
    """Whether a page without a marker, as studies had before, says how it was made; or there are records."""
    page = owned.mentions(folder / "index.md", f"python -m experiments.study {name}")
    return page or owned.mentions(folder / records.FILE, '"record":')


def draw(study: Study[Any, Any], version: str, root: Path) -> list[Path]:
    """Draw every plot of a study, from the records below ``root``. Each carries the hash of those records.

    Raises:
        RunnerError: there are no records, or their plan was edited.
    """
    folder = own_folder(study, root)
    found = recorded(study, version_of(study, version), folder)
    figures, source, drawn = study.figures(found), records.digest(folder), []
    for each in figures:
        path = folder / f"{each.name}.png"
        with figure([path], each.columns, each.rows, each.size, source=source) as (_, axes):
            each.draw(axes)
        drawn.append(path)
    return drawn


def write_page(study: Study[Any, Any], version: str, root: Path) -> Path:
    """The page of what was drawn: the published one, or below another root one of the generated parts alone."""
    if root == ROOT / RESULTS:
        page = ROOT / PAGES[study.name]
        write_atomic(page, fill(page.read_text(encoding="utf-8"), blocks(study.name)))
        return page
    found, page = recorded(study, version_of(study, version), root / study.name), root / study.name / "index.md"
    parts = (f"# {study.title}", results(study, found), how_to_run(study, found))
    write_atomic(page, "\n\n".join(parts) + "\n")
    return page
