"""Lists, shows, compares, cleans and exports recorded runs, offline and from their folders alone.

    seqarch runs list runs/mqar --status failed
    seqarch runs show attention-seed0
    seqarch runs diff attention-seed0 attention-seed1
    seqarch runs gc --checkpoints --delete
    seqarch runs export runs.csv

A run is named by its folder, or by a part of its name that no other run has. Exit codes: 0 all was shown or done, 1 a
run or a folder could not be read, and is named.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.runs.differences import differences
from experiments.runs.recorded import STATUSES, RecordedRun, find_runs, pick_run
from experiments.sweeps.cleaning import leftovers, remove
from experiments.sweeps.remaining import sweeps_below
from experiments.util.errors import RunnerError, choices_hint, writing
from experiments.util.files import write_atomic
from experiments.util.output import console, exit_code
from experiments.util.program import program

TABLE_FORMATS = (".csv", ".parquet")
WIDE = 200
"""Columns where the output is no terminal, so that no name is cut."""


def list_runs(screen: Console, arguments: argparse.Namespace) -> int:
    if arguments.status not in (None, *STATUSES):
        raise RunnerError(f"--status {arguments.status}: {choices_hint(arguments.status, STATUSES)}")
    found = find_runs(arguments.root)
    runs = [run for run in found if arguments.status in (None, run.status)]
    table = Table("Experiment", "Run", "Status", "Validation", "Test", "Steps", "Seconds", "Started", box=SIMPLE_HEAD)
    for run in runs:
        numbers = ("results.validation", "results.test", "cost.steps", "cost.train_seconds")
        started = str(run.get("started") or "")[:16].replace("T", " ")
        values = (run.get("config.experiment"), run.name, run.status, *map(run.get, numbers), started)
        table.add_row(*map(_text, values))
    if runs:
        screen.print(table)
    counts = Counter(run.status for run in runs)
    summary = ", ".join(f"{number} {status}" for status, number in counts.most_common())
    screen.print(f"{len(runs)} runs" + (f": {summary}" if summary else ""))
    for name, sweep in sweeps_below(arguments.root).items():
        screen.print(f"sweep {name}: {sweep}", soft_wrap=True)
    return _print_problems(screen, found)


def _print_problems(screen: Console, runs: Iterable[RecordedRun]) -> int:
    """Print what cannot be read; 1 if there is something, else 0."""
    problems = [run.problem for run in runs if run.problem is not None]
    for problem in problems:
        screen.print(f"damaged: {problem}", soft_wrap=True)
    return min(len(problems), 1)


def show_run(screen: Console, arguments: argparse.Namespace) -> int:
    run = pick_run(arguments.root, arguments.run)
    screen.print(run.path, soft_wrap=True)
    for key, value in run.flat().items():
        if value is not None:
            screen.print(f"  {key}: {_text(value)}", soft_wrap=True)
    for path in sorted(run.path.iterdir()):
        screen.print(f"  {path.name}" + ("/" if path.is_dir() else ""))
    return 1 if run.problem else 0


def diff_runs(screen: Console, arguments: argparse.Namespace) -> int:
    a, b = (pick_run(arguments.root, name) for name in (arguments.a, arguments.b))
    screen.print(f"A  {a.path}\nB  {b.path}", soft_wrap=True)
    found = differences(a, b)
    for section, pairs in found.items():
        table = Table(section, "A", "B", box=SIMPLE_HEAD, title_justify="left")
        for path, pair in pairs.items():
            table.add_row(path, *map(_text, pair))
        screen.print(table)
    if not found:
        screen.print("they do not differ")
    return _print_problems(screen, (a, b))


def collect_garbage(screen: Console, arguments: argparse.Namespace) -> int:
    found = leftovers(arguments.root, arguments.checkpoints, arguments.failed)
    freed = sum(leftover.size for leftover in found)
    if not arguments.delete:
        for leftover in found:
            screen.print(f"{leftover.path}: {leftover.why}", soft_wrap=True)
        screen.print(f"{len(found)} can go, {freed / 2**20:.1f} MiB; --delete deletes them")
        return _print_problems(screen, find_runs(arguments.root))
    kept = [(leftover, reason) for leftover, reason in remove(found) if reason is not None]
    for leftover, reason in kept:
        screen.print(f"{leftover.path} stayed: {reason}", soft_wrap=True)
        freed -= leftover.size
    screen.print(f"{len(found) - len(kept)} deleted, {freed / 2**20:.1f} MiB")
    return _print_problems(screen, find_runs(arguments.root))


def export(screen: Console, arguments: argparse.Namespace) -> int:
    if arguments.file.suffix not in TABLE_FORMATS:
        raise RunnerError(f"{arguments.file}: expected a name that ends with {' or '.join(TABLE_FORMATS)}")
    runs = find_runs(arguments.root)
    rows = [{key: _cell(value) for key, value in run.flat().items()} for run in runs]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if arguments.file.suffix == ".parquet":
        _write_parquet(arguments.file, columns, rows)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(arguments.file, text.getvalue())
    screen.print(f"{arguments.file}: {len(rows)} runs, {len(columns)} columns", soft_wrap=True)
    return _print_problems(screen, runs)


def _write_parquet(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    try:
        import polars  # Takes as long to import as everything else here.
    except ModuleNotFoundError as error:
        raise RunnerError(
            f"{path}: Parquet needs {error.name}, which is not installed: pip install 'seqarch[export]', or name a .csv"
        ) from error
    # A column of several types, such as a width that some runs leave to the mixer, becomes text.
    for key in columns:
        if len({_kind(row[key]) for row in rows if row.get(key) is not None}) > 1:
            rows = [{**row, key: None if row.get(key) is None else str(row[key])} for row in rows]
    with writing(path):
        polars.DataFrame(rows, schema=columns, infer_schema_length=None).write_parquet(path)


def _kind(value: Any) -> type:
    """The type of a column's cell; whole numbers fit among others."""
    return float if type(value) is int else type(value)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _text(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else str(_cell(value))
    return text if len(text) <= 300 else f"{text[:300]} ..."


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog=program("runs"),
        description="List, show, compare, clean and export runs.",
        allow_abbrev=False,
    )
    commands = command.add_subparsers(required=True)

    def add(name: str, action: Any, description: str, *names: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
        for each in names:
            sub.add_argument(each)
        if names:
            sub.add_argument("--root", type=Path, default=Path("runs"), help="the folder of the runs (default: runs)")
        sub.set_defaults(action=action)
        return sub

    root = {"type": Path, "nargs": "?", "default": Path("runs"), "help": "the folder of the runs (default: runs)"}
    listing = add("list", list_runs, "every run with its status and result")
    listing.add_argument("root", **root)
    listing.add_argument("--status", help=f"only those: {', '.join(STATUSES)}")
    add("show", show_run, "all that is recorded of a run", "run")
    add("diff", diff_runs, "what differs between two runs", "a", "b")
    cleaning = add("gc", collect_garbage, "what killed processes left behind")
    cleaning.add_argument("root", **root)
    cleaning.add_argument("--checkpoints", action="store_true", help="checkpoints of finished runs, too")
    cleaning.add_argument("--failed", action="store_true", help="the folders of failed runs, too")
    cleaning.add_argument("--delete", action="store_true", help="delete them; without it they are only listed")
    exporting = add("export", export, "every run as one line of a table")
    exporting.add_argument("file", type=Path, help="a name that ends with .csv or .parquet")
    exporting.add_argument("root", **root)
    return command


def main() -> int:
    arguments = parser().parse_args()
    return exit_code(lambda: arguments.action(console(WIDE), arguments))


if __name__ == "__main__":
    sys.exit(main())
