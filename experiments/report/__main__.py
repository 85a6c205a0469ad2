"""Writes and prints the report on recorded runs: ``seqarch report runs/demo``

Reads run folders alone, offline, and writes ``report/`` beside them: ``index.md``, ``results.csv`` and the plots.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.report.comparison import Comparison
from experiments.report.page import table_rows, tuned_paths
from experiments.report.write import report
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


def main() -> int:
    parser = argparse.ArgumentParser(
        program("report"),
        description="Draws and tabulates recorded runs. Exit codes: 0 all is shown, 1 something could not be read.",
    )
    parser.add_argument("root", type=Path, help="a folder that holds runs at any depth, such as runs/mqar")
    root = parser.parse_args().root

    def write() -> int:
        target, comparisons, problems = report(root)
        print_tables(comparisons, problems, target)
        return 1 if problems else 0

    return exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
