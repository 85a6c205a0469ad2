"""One question, one command: trains what is missing, selects on validation, and writes records, plots and page.

    seqarch study initialisation                # as published: docs/results/initialisation.md
    seqarch study initialisation --plan         # what is fixed before the first run, to be committed
    seqarch study initialisation --draw         # the page from the committed records, offline
    seqarch study --all --version small         # all of them, in minutes: runs/results/small

Runs go through the ordinary runner: a process each, found again when they are finished, on record when they fail.
Exit codes: 0 all is done, 1 a run failed or something is missing, 130 stopped by a signal.
"""

from __future__ import annotations

import argparse
import os
import sys

from experiments.config.schema import folder_path
from experiments.studies import STUDIES
from experiments.studies.page import RESULTS
from experiments.studies.publish import draw, train_and_record, write_page, write_plan
from experiments.studies.study import VERSIONS
from experiments.util.errors import RunnerError, choices_hint
from experiments.util.interrupts import INTERRUPTED
from experiments.util.output import exit_code
from experiments.util.paths import INSTALLED, ROOT
from experiments.util.program import program, record_command


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        program("study"), description="Answer a question by runs, and write its page.", allow_abbrev=False
    )
    command.add_argument("name", nargs="*", help=f"{', '.join(STUDIES)}")
    command.add_argument("--all", action="store_true", help="every study")
    command.add_argument("--version", choices=VERSIONS, default="recorded", help="which size (default: recorded)")
    command.add_argument("--plan", action="store_true", help="train nothing: write the plan with its margins")
    command.add_argument("--draw", action="store_true", help="train nothing: draw the records that are there")
    command.add_argument(
        "--results",
        help="the folder of records and pages (default: docs/results, and of other versions runs/results/VERSION)",
    )
    command.add_argument("--runs", default="runs", help="the folder of the runs (default: runs)")
    command.add_argument(
        "--config-dir", "-cd", metavar="FOLDER", help="refused: what a study compares is fixed in it before its runs"
    )
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: one per core)")
    return command


def main() -> int:
    return exit_code(answer)


def answer() -> int:
    """Train, draw and write the studies that the command line names; the exit code."""
    arguments = parser().parse_args()
    record_command("study")
    if arguments.config_dir is not None:
        raise RunnerError(
            f"--config-dir {arguments.config_dir}: a study composes no configurations: what it compares is"
            " fixed in it, and kept as its plan, before its first run. Compare your own with `seqarch run --config-dir"
            f" {arguments.config_dir} --multirun ...` and `seqarch report`"
        )
    names, worst = list(STUDIES) if arguments.all else arguments.name, 0
    runs = folder_path("--runs", arguments.runs)
    root = ROOT / RESULTS if arguments.version == "recorded" else runs / "results" / arguments.version
    if arguments.results is not None:
        root = folder_path("--results", arguments.results)
    if not names:
        raise RunnerError(f"no study is named, {choices_hint('', STUDIES)}, or --all")
    if INSTALLED and arguments.version == "recorded" and arguments.results is None:
        raise RunnerError(
            f"the records and pages of the recorded version are in docs/results of a checkout of seqarch, and this is"
            f" installed in {ROOT}: give --version small, or --results FOLDER, or run it from a checkout"
        )
    if arguments.jobs < 1:
        raise RunnerError(f"--jobs is {arguments.jobs}, expected at least 1")
    for name in names:
        if name not in STUDIES:
            raise RunnerError(f"unknown study {name!r}, {choices_hint(name, STUDIES)}")
    for study in (STUDIES[name] for name in names):
        print(f"\n{study.title} ({study.name}, {arguments.version})", flush=True)
        if arguments.plan:
            print(write_plan(study, arguments.version, root))
            continue
        code = 0 if arguments.draw else train_and_record(study, arguments.version, root, runs, arguments.jobs)
        if code == INTERRUPTED:
            print("stopped; the same command resumes with what is missing")
            return code
        worst = max(worst, code)
        drawn = draw(study, arguments.version, root)
        print("\n".join(map(str, [*drawn, write_page(study, arguments.version, root)])), flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
