"""Reads recorded runs of every kind for the explorer: folders of runs, and the records of studies.

What cannot be read is a sentence that names the file and the line; everything else is read all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.report.checks import comparable_runs
from experiments.report.explorer_lines import read_line
from experiments.report.explorer_table import Records
from experiments.runs.recorded import RecordedRun
from experiments.util.errors import RunnerError


def read_records(paths: Sequence[Path]) -> Records:
    """The runs of folders, and of files of records, in the order given; those below the working directory by what
    they are called from there, as a page that is passed on says nothing of the machine.
    """
    records, here = Records(), Path.cwd()
    for path in paths:
        path = path.relative_to(here) if path.is_relative_to(here) else path
        records.sources.append(str(path))
        if path.is_dir():
            _read_folder(path, records)
        else:
            _read_file(path, records)
    return records


def _read_folder(folder: Path, records: Records) -> None:
    """The runs below a folder; of one without any, the files of records there."""
    runs, problems = comparable_runs(folder)
    add_runs(runs, problems, records)
    if not runs and not problems:
        for file in sorted(folder.rglob("records.jsonl")):
            _read_file(file, records)


def add_runs(runs: Sequence[RecordedRun], problems: Sequence[str], records: Records) -> None:
    """Add runs of folders, and what could not be read of others."""
    records.problems += problems
    for run in runs:
        try:
            records.add(run, str(run.path))
        except RunnerError as error:
            records.problems.append(f"{run.path}: {error}")


def _read_file(file: Path, records: Records) -> None:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"it is no UTF-8 ({error})"
        records.problems.append(f"{file} cannot be read: {reason}")
        return
    for where, line in _parts(file, text, records.problems):
        try:
            read_line(line, where, records)
        except RunnerError as error:
            records.problems.append(str(error))


def _parts(file: Path, text: str, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with where it stands: the lines of JSON lines, or the rows of one object."""
    if file.suffix == ".json":
        whole = _parsed(text, str(file), problems)
        rows = (whole or {}).get("rows")
        if whole is not None and not isinstance(rows, list):
            problems.append(f"{file} has no rows: expected what `seqarch bench decode` writes")
        yield from ((f"row {number} of {file}", row) for number, row in enumerate(rows or [], 1))
        return
    for number, each in enumerate(text.splitlines(), 1):
        where = f"line {number} of {file}"
        if each.strip() and (line := _parsed(each, where, problems)) is not None:
            yield where, line


def _parsed(text: str, where: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError as error:
        problems.append(f"{where} is damaged: expected one object of JSON, and {error}")
        return None
    if not isinstance(found, dict):
        problems.append(f"{where} is damaged: expected one object of JSON, got {text.strip()[:40]}")
        return None
    return found
