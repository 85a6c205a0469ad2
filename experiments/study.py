"""One question, one command: trains what is missing, selects on validation, and writes records, plots and page.

    python -m experiments.study recall_and_state                   # as published: docs/results/recall_and_state.md
    python -m experiments.study recall_and_state --draw            # the same from the committed records, offline
    python -m experiments.study --all --version small              # all of them, in minutes: runs/results/small

Runs go through the ordinary runner: a process each, found again when they are finished, on record when they fail.
Exit codes: 0 all is done, 1 a run failed or something is missing, 130 stopped by a signal.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from functools import partial
from pathlib import Path

from experiments.config.schema import folder_path
from experiments.studies import STUDIES, records
from experiments.studies.page import PAGES, RESULTS, blocks, how_to_run, results
from experiments.studies.study import VERSIONS, Study
from experiments.studies.sweep import configurations, train
from experiments.util import owned
from experiments.util.blocks import fill
from experiments.util.errors import RunnerError, choices_hint, writing
from experiments.util.files import write_atomic
from experiments.util.interrupts import INTERRUPTED
from experiments.util.output import exit_code
from experiments.util.paths import ROOT
from experiments.util.plot_style import figure


def do(study: Study, version: str, root: Path, runs: Path, jobs: int) -> int:
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
    """Where the files of a study are written below ``root``.

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
    pictures = study.pictures(study.read(root))
    folder, source, drawn = own_folder(study, root), records.digest(study.folders(root)), []
    for picture in pictures:
        path = folder / f"{picture.name}.png"
        with figure([path], picture.columns, picture.rows, picture.size, source=source) as (_, axes):
            picture.draw(axes)
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


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        "python -m experiments.study", description="Answer a question by runs, and write its page.", allow_abbrev=False
    )
    command.add_argument("name", nargs="*", help=f"{', '.join(STUDIES)}")
    command.add_argument("--all", action="store_true", help="every study")
    command.add_argument("--version", choices=VERSIONS, default="recorded", help="which size (default: recorded)")
    command.add_argument("--draw", action="store_true", help="train nothing: draw the records that are there")
    command.add_argument("--runs", default="runs", help="where runs lie (default: runs)")
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: one a core)")
    return command


def main() -> int:
    return exit_code(answer)


def answer() -> int:
    """Do, draw and tell the studies that the command line names; the exit code."""
    arguments = parser().parse_args()
    os.environ["SEQARCH_COMMAND"] = shlex.join(["python", "-m", "experiments.study", *sys.argv[1:]])
    names, worst = list(STUDIES) if arguments.all else arguments.name, 0
    runs = folder_path("--runs", arguments.runs)
    root = ROOT / RESULTS if arguments.version == "recorded" else runs / "results" / arguments.version
    if not names:
        raise RunnerError(f"no study is named, {choices_hint('', STUDIES)}, or --all")
    if arguments.jobs < 1:
        raise RunnerError(f"--jobs is {arguments.jobs}, expected at least 1")
    for name in names:
        if name not in STUDIES:
            raise RunnerError(f"unknown study {name!r}, {choices_hint(name, STUDIES)}")
    for study in (STUDIES[name] for name in names):
        print(f"\n{study.title} ({study.name}, {arguments.version})", flush=True)
        code = 0 if arguments.draw else do(study, arguments.version, root, runs, arguments.jobs)
        if code == INTERRUPTED:
            print("stopped; the same command goes on with what is missing")
            return code
        worst = max(worst, code)
        drawn = draw(study, root)
        print("\n".join(map(str, [*drawn, write_page(study, root)])), flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
