"""The differences between two runs: configuration, code, environment, data, backends, course and result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from experiments.config.schema import flat
from experiments.runs.folder import RunFolder
from experiments.runs.recorded import RecordedRun, is_items
from experiments.util.errors import RunnerError

SECTIONS = {
    "config": ("config",),
    "code": ("code", "plugins"),
    "environment": ("environment", "hardware"),
    "data": ("data",),
    "backends": ("backends",),
    "result": ("status", "reason", "results", "model"),
    "cost": ("cost",),
}
"""The paths of the values in each section."""

ABSENT = "-"
TIMES = ("tokens_per_second",)
"""Metrics that differ between any two runs."""


def differences(a: RecordedRun, b: RecordedRun) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Both values of everything that is not the same, by section and dotted path."""
    found = {name: _differing(_part(a, paths), _part(b, paths)) for name, paths in SECTIONS.items()}
    found["course"] = _course(a, b)
    return {name: found[name] for name in (*list(SECTIONS)[:-1], "course", "cost") if found[name]}


def _part(run: RecordedRun, paths: tuple[str, ...]) -> dict[str, Any]:
    values = {path: run.status if path == "status" else run.get(path) for path in paths}
    whole: dict[str, Any] = {}
    for path, inner in values.items():
        whole |= flat(inner, path)
    if "code" in paths:
        whole["code.diff"] = _diff_of(run.folder)
    whole |= {key: _items_in_words(value) for key, value in whole.items() if is_items(key)}
    return {key: value for key, value in whole.items() if value is not None}


def _items_in_words(text: str) -> str:
    """A name for the scores of single sequences, so that equal ones are equal."""
    return f"encoded in {len(text)} characters ({hashlib.sha256(text.encode()).hexdigest()[:10]})"


def _diff_of(folder: RunFolder) -> str | None:
    """A name for the content of ``code.diff``, so that equal changes are equal."""
    try:
        content = folder.diff_file.read_bytes()
    except OSError:
        return None
    return f"{folder.diff_file} ({hashlib.sha256(content).hexdigest()[:10]})" if content else None


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in dict.fromkeys((*a, *b))}
    return {key: pair for key, pair in pairs.items() if _differ(key, *pair)}


def _differ(key: str, a: Any, b: Any) -> bool:
    if key == "code.diff" and ABSENT not in (a, b):
        return a.rpartition("(")[2] != b.rpartition("(")[2]
    return a != b


def _course(a: RecordedRun, b: RecordedRun) -> dict[str, tuple[Any, Any]]:
    """The first evaluation at which the metrics of both are not the same."""
    try:
        lines = [{line["step"]: line for line in run.metrics} for run in (a, b)]
    except RunnerError as error:
        return {"metrics.jsonl": (str(error), ABSENT)}
    for step in sorted(lines[0].keys() & lines[1].keys()):
        pairs = _differing(*({key: x for key, x in line[step].items() if key not in TIMES} for line in lines))
        if pairs:
            return {f"step {step}, {key}": pair for key, pair in pairs.items()}
    return {}
