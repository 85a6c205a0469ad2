"""Searches for the setting that is best on validation data, with Optuna.

    seqarch search experiment=mqar model=mamba2 seed=0,1 \\
        'train.lr=tag(log, interval(1e-4, 1e-2))' train.weight_decay=0,0.1 search.trials=20 search.jobs=2

Choices and intervals in Hydra's grammar are searched; the seeds are those that every trial is trained with, and its
value is their median on the validation split. The same command again finds what is finished and resumes with what is
missing.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from experiments.config.overrides import config_folder
from experiments.config.reference import keys
from experiments.run_help import described
from experiments.sweeps.search import CONFIG_DIR, Search, SearchOptions
from experiments.sweeps.session import SweepSession
from experiments.util.errors import RunnerError
from experiments.util.interrupts import INTERRUPTED
from experiments.util.output import exit_code, print_error
from experiments.util.program import program, record_command

EXIT_CODES = {"complete": 0, "failed": 1, "stopped": INTERRUPTED}


def parser() -> argparse.ArgumentParser:
    description, _, example = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    command = argparse.ArgumentParser(
        program("search"),
        description=description,
        epilog="\n".join([example, "options of the search:", *described(keys(SearchOptions, "search."))]),
        formatter_class=form,
        allow_abbrev=False,
    )
    command.add_argument(
        "arguments", nargs="*", metavar="KEY=VALUE", help="as of `seqarch run`, and those of the search below"
    )
    command.add_argument("--config-dir", "-cd", metavar="FOLDER", help="of configurations besides the runner's own")
    return command


def main() -> int:
    given = parser().parse_intermixed_args()
    record_command("search")
    session, search = SweepSession(), None
    session.watch_signals()
    try:
        folder = config_folder(sys.argv[1:])
        search = Search([*([f"{CONFIG_DIR}={folder.absolute()}"] if folder else []), *given.arguments])
        ending = search.run(session.open(search.config.runs, search.options.trials * len(search.seeds)))
    except RunnerError as error:
        ending = "failed"
        print_error(str(error))
    outcome = session.close()
    if session.stopped.is_set():
        return INTERRUPTED
    if search is not None and outcome.entries and (best := search.best()):
        value = f"{search.metric.label.lower()} {best['validation']:.4g} on validation"
        print(f"best: {shlex.join(best['overrides'])}, {value}\nall trials: {search.file}")
    return EXIT_CODES[ending] or int(not outcome.shown)


if __name__ == "__main__":
    sys.exit(exit_code(main))
