"""Writes and prints the report on recorded runs: ``seqarch report runs/demo``

Reads run folders alone, offline, and writes ``report/`` beside them: ``index.md``, ``results.csv``, the plots and
``explorer.html``, one page in which a reader chooses what is plotted. The explorer alone, of records of any kind:

    seqarch report --explorer runs.html runs/mqar docs/results/*/records.jsonl --open
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.report import explorer
from experiments.report.comparison import Comparison
from experiments.report.opening import open_page
from experiments.report.page import table_rows, tuned_paths
from experiments.report.write import report
from experiments.util.errors import RunnerError
from experiments.util.output import console, exit_code
from experiments.util.program import program

WIDE = 110
"""Columns where the output is no terminal."""

TERMINAL_HEADER = ("Seeds", "Parameters", "FLOPs", "State", "Tokens/s")
TERMINAL_TUNED = {"train.lr": "LR", "train.weight_decay": "WD"}
"""Short names of the table's later columns; ``index.md`` has the long ones."""


def print_tables(comparisons: list[Comparison], problems: list[str], target: Path) -> None:
    """The tables, in the terminal."""
    screen = console(WIDE)
    for comparison in comparisons:
        if comparison.shown:
            _, *rows = table_rows(comparison)
            tuned = [TERMINAL_TUNED[name] for name in tuned_paths(comparison)]
            header = ("Model", comparison.sample["metric"]["label"], *TERMINAL_HEADER, *tuned)
            title = f"{comparison.title} ({comparison.name})"
            table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
            wrapped = (header[1], *tuned)
            for name in header:
                table.add_column(name, justify="left" if name == "Model" else "right", no_wrap=name not in wrapped)
            for row in rows:
                table.add_row(*row)
            screen.print(table)
        for remark in comparison.remarks:
            screen.print(f"{comparison.name}: {remark}")
    for problem in problems:
        screen.print(f"not read: {problem}", soft_wrap=True)
    screen.print(f"The plots and the whole report: {target / 'index.md'}", soft_wrap=True)
    screen.print(f"All runs, to be plotted as you choose, in a browser: {target / explorer.FILE}", soft_wrap=True)


def write_report(root: Path, opens: bool) -> int:
    """The report on a folder of runs; 1 where something could not be read."""
    target, comparisons, problems = report(root)
    print_tables(comparisons, problems, target)
    if opens:
        print(open_page(target / explorer.FILE))
    return 1 if problems else 0


def write_explorer(target: Path, records: list[Path], opens: bool) -> int:
    """The explorer alone, of folders and files of records; 1 where something could not be read."""
    read = explorer.write(records, target)
    for problem in read.problems:
        print(f"not read: {problem}")
    size = target.stat().st_size / 2**20
    print(f"{target}: {len(read.rows)} runs, {size:.1f} MiB" + ("" if read.rows else "; nothing is recorded there"))
    if opens:
        print(open_page(target))
    return 1 if read.problems else 0


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        program("report"),
        description="Draws and tabulates recorded runs. Exit codes: 0 all is shown, 1 something could not be read.",
        allow_abbrev=False,
    )
    command.add_argument("roots", type=Path, nargs="+", metavar="RUNS",
                         help="a folder that holds runs at any depth, such as runs/mqar; with --explorer several, and"
                              " files of records, such as docs/results/*/records.jsonl")  # fmt: skip
    command.add_argument("--explorer", type=Path, metavar="FILE",
                         help="write only the explorer, one HTML file, there; a report has its own")  # fmt: skip
    command.add_argument("--open", action="store_true", help="open the explorer in a browser")
    return command


def main() -> int:
    arguments = parser().parse_args()

    def write() -> int:
        if arguments.explorer is not None:
            return write_explorer(arguments.explorer, arguments.roots, arguments.open)
        if len(arguments.roots) > 1:
            raise RunnerError(f"{len(arguments.roots)} folders were given; a report is of one, --explorer FILE of many")
        return write_report(arguments.roots[0], arguments.open)

    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
