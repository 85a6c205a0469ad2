"""Looks at recorded runs, offline and from their folders alone.

    python -m experiments.runs list runs/mqar --status failed
    python -m experiments.runs show attention-seed0
    python -m experiments.runs diff attention-seed0 attention-seed1
    python -m experiments.runs gc --checkpoints --delete
    python -m experiments.runs export runs.csv

A run is named by its folder, or by a part of its name that no other run has.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.catalogue import find, pick
from experiments.cleaning import leftovers, remove
from experiments.differences import differences
from experiments.errors import RunnerError, writing
from experiments.files import write_atomic

FORMATS = (".csv", ".parquet")
WIDE = 200
"""Columns where the output is no terminal, so that no name is cut."""


def list_runs(console: Console, arguments: argparse.Namespace) -> None:
    entries = [each for each in find(arguments.root) if arguments.status in (None, each.status)]
    table = Table("Experiment", "Run", "Status", "Validation", "Test", "Steps", "Seconds", "Started", box=SIMPLE_HEAD)
    for entry in entries:
        numbers = ("results.validation", "results.test", "cost.steps", "cost.train_seconds")
        started = str(entry.get("started", ""))[:16].replace("T", " ")
        values = (entry.get("config.experiment", ""), entry.name, entry.status, *map(entry.get, numbers), started)
        table.add_row(*map(_text, values))
    if entries:
        console.print(table)
    counts = Counter(entry.status for entry in entries)
    told = ", ".join(f"{number} {status}" for status, number in counts.most_common())
    console.print(f"{len(entries)} runs" + (f": {told}" if told else ""), markup=False)
    for entry in entries:
        if entry.problem is not None:
            console.print(f"damaged: {entry.problem}", markup=False, soft_wrap=True)


def show_run(console: Console, arguments: argparse.Namespace) -> None:
    entry = pick(arguments.root, arguments.run)
    console.print(entry.folder.path, markup=False, soft_wrap=True)
    for key, value in entry.flat().items():
        if value is not None:
            console.print(f"  {key}: {_text(value)}", markup=False, soft_wrap=True)
    for path in sorted(entry.folder.path.iterdir()):
        console.print(f"  {path.name}" + ("/" if path.is_dir() else ""), markup=False)


def diff_runs(console: Console, arguments: argparse.Namespace) -> None:
    a, b = (pick(arguments.root, name) for name in (arguments.a, arguments.b))
    console.print(f"A  {a.folder.path}\nB  {b.folder.path}", markup=False, soft_wrap=True)
    found = differences(a, b)
    for section, pairs in found.items():
        table = Table(section, "A", "B", box=SIMPLE_HEAD, title_justify="left")
        for path, pair in pairs.items():
            table.add_row(path, *map(_text, pair))
        console.print(table)
    if not found:
        console.print("they do not differ", markup=False)


def collect_garbage(console: Console, arguments: argparse.Namespace) -> None:
    found = leftovers(arguments.root, arguments.checkpoints, arguments.failed)
    freed = sum(leftover.size for leftover in found)
    if not arguments.delete:
        for leftover in found:
            console.print(f"{leftover.path}: {leftover.why}", markup=False, soft_wrap=True)
        console.print(f"{len(found)} can go, {freed / 2**20:.1f} MiB; --delete deletes them", markup=False)
        return
    kept = [(leftover, reason) for leftover, reason in remove(found) if reason is not None]
    for leftover, reason in kept:
        console.print(f"{leftover.path} stayed: {reason}", markup=False, soft_wrap=True)
        freed -= leftover.size
    console.print(f"{len(found) - len(kept)} deleted, {freed / 2**20:.1f} MiB", markup=False)


def export(console: Console, arguments: argparse.Namespace) -> None:
    if arguments.file.suffix not in FORMATS:
        raise RunnerError(f"{arguments.file}: expected a name that ends with {' or '.join(FORMATS)}")
    rows = [{key: _cell(value) for key, value in entry.flat().items()} for entry in find(arguments.root)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if arguments.file.suffix == ".parquet":
        _write_parquet(arguments.file, columns, rows)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(arguments.file, text.getvalue())
    console.print(f"{arguments.file}: {len(rows)} runs, {len(columns)} columns", markup=False, soft_wrap=True)


def _write_parquet(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    import polars  # Takes as long to import as everything else here.

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
    command = argparse.ArgumentParser(description="Look at recorded runs.")
    commands = command.add_subparsers(required=True)

    def add(name: str, action: Any, told: str, *names: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=told, description=told)
        for each in names:
            sub.add_argument(each)
        if names:
            sub.add_argument("--root", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
        sub.set_defaults(action=action)
        return sub

    root = {"type": Path, "nargs": "?", "default": Path("runs"), "help": "where runs lie (default: runs)"}
    listing = add("list", list_runs, "every run with its status and result")
    listing.add_argument("root", **root)
    listing.add_argument("--status", help="only those, such as failed, running or killed")
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
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE)
    try:
        arguments.action(console, arguments)
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # As `| head` does.
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
