"""From a study to its results: trains what is missing, writes the records, draws the figures, writes the page."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from experiments.studies import records
from experiments.studies.page import PAGES, RESULTS, blocks, how_to_run, results
from experiments.studies.study import Study
from experiments.studies.sweep import configurations, train
from experiments.util import owned
from experiments.util.blocks import fill
from experiments.util.errors import RunnerError, choices_hint, writing
from experiments.util.files import write_atomic
from experiments.util.interrupts import INTERRUPTED
from experiments.util.paths import ROOT
from experiments.util.plot_style import figure


def train_and_record(study: Study, version: str, root: Path, runs: Path, jobs: int) -> int:
    """Train a version's missing runs and write its records below ``root``; the exit code."""
    if not study.sweeps:
        return 0
    if version not in study.sweeps:
        raise RunnerError(f"{study.name} has no version {version!r}, {choices_hint(version, study.sweeps)}")
    folder = own_folder(study, root)
    code = train(study.sweeps[version], runs, jobs)
    if code != INTERRUPTED:
        records.write(records.collect(configurations(study.sweeps[version], runs), study.history), folder)
    return code


def own_folder(study: Study, root: Path) -> Path:
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


def draw(study: Study, root: Path) -> list[Path]:
    """Every plot of a study, from the records below ``root``. Each carries the hash of those records."""
    figures = study.figures(study.read(root))
    folder, source, drawn = own_folder(study, root), records.digest(study.folders(root)), []
    for each in figures:
        path = folder / f"{each.name}.png"
        with figure([path], each.columns, each.rows, each.size, source=source) as (_, axes):
            each.draw(axes)
        drawn.append(path)
    return drawn


def write_page(study: Study, root: Path) -> Path:
    """The page of what was drawn: the published one, or below another root one of the generated parts alone."""
    if root == ROOT / RESULTS:
        page = ROOT / PAGES[study.name]
        write_atomic(page, fill(page.read_text(encoding="utf-8"), blocks(study.name)))
        return page
    runs, page = study.read(root), root / study.name / "index.md"
    parts = (f"# {study.title}", results(study, runs, folder=""), how_to_run(study, runs))
    write_atomic(page, "\n\n".join(parts) + "\n")
    return page
