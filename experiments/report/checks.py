"""The recorded runs that a report can compare: those whose folders hold all that its tables and plots need."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.config.plugins import KEYS, import_plugins
from experiments.config.schema import check_format
from experiments.runs.recorded import RecordedRun, find_runs, is_finite
from experiments.tasks.groups import DEPTH
from experiments.util.errors import ConfigError, RunnerError

NUMBER = (int, float)
OF_CONFIG = {
    "experiment": str, "seed": int, "model.name": str, "model.pattern": str, "task": dict, "train.lr": NUMBER,
    "train.weight_decay": NUMBER,
}  # fmt: skip
"""The types of what the configuration of every run holds, by path."""

OF_RECORD = {
    "results.test": NUMBER, "results.validation": NUMBER,
    "cost.flops": NUMBER, "cost.tokens_per_second": NUMBER, "cost.steps": NUMBER, "cost.flops_formula": str,
    "model.parameters": NUMBER, "model.state_bytes": NUMBER, "model.state_length": NUMBER,
    "metric.name": str, "metric.label": str, "metric.unit": str, "metric.higher_is_better": bool,
    "metric.chance": NUMBER, "metric.chance_label": str,
    "task.title": str, "task.reading": str, "data.hash": str, "command": str,
    "hardware.cpu": str, "hardware.cores": NUMBER, "hardware.threads": NUMBER,
    "environment.python": str, "environment.packages.torch": str,
    "code.commit": (str, type(None)), "code.dirty": (bool, type(None)),
}  # fmt: skip
"""The types of what the record of every finished run holds, by path."""

PARTS = ("results", "cost", "model", "metric", "data", "code")
"""Mappings of a record that is not finished, where they are there."""


def comparable_runs(root: Path) -> tuple[list[RecordedRun], list[str]]:
    """Every run below a folder, and a sentence on each folder that could not be read.

    Raises:
        RunnerError: there is no such folder.
    """
    runs, problems, found = [], [], find_runs(root)
    _import_plugins(found)
    for run in found:
        try:
            _check(run)
            runs.append(run)
        except RunnerError as error:
            problems.append(str(error))
    return runs, problems


def _import_plugins(runs: list[RecordedRun]) -> None:
    """Import the plug-ins of the runs, so that equal options of their mixers are known to be equal; say which are not
    here. Runs are shown without them, too.
    """
    lists = (run.config.get(key) for run in runs for key in KEYS)
    names = [str(name) for each in lists if isinstance(each, list) for name in each]
    for name in ["", *dict.fromkeys(names)]:
        try:
            import_plugins([name] if name else [])
        except ConfigError as error:
            print(f"note: {error}; its runs are shown without it", file=sys.stderr)


def _check(run: RecordedRun) -> None:
    """Raise an error that names the folder where something of a run is missing or is not what it should be."""
    if run.problem is not None:
        raise RunnerError(run.problem)
    require(run.config, OF_CONFIG, f"{run.path}: its config.json is not that of a run")
    check_format(run.config, run.folder.config_file)
    _ = run.metrics, run.lm_eval  # Lines that are damaged are found as they are read.
    damaged = f"{run.path}: its record is damaged"
    is_over = run.recorded_status == "finished"
    require(run.record, OF_RECORD if is_over else {part: dict for part in PARTS if part in run.record}, damaged)
    if is_over:
        check_results(run.record, damaged)


def check_results(record: dict[str, Any], damaged: str) -> None:
    """Raise an error that begins with ``damaged`` where the curve or the tests of a finished run are none."""
    if "curve" in record["results"]:
        _check_curve(record["results"]["curve"], f"{damaged}, results.curve is no curve")
    require(record, {"results.tests": dict} if "tests" in record["results"] else {}, damaged)
    for name, test in record["results"].get("tests", {}).items():
        _check_depths(test, f"{damaged}, results.tests.{name} is no test")


def require(value: dict[str, Any], kinds: Mapping[str, Any], otherwise: str) -> None:
    """Raise an error that begins with ``otherwise`` unless each path leads to a value of its kind."""
    for path, kind in kinds.items():
        found: Any = value
        for key in path.split("."):
            if not isinstance(found, dict) or key not in found:
                raise RunnerError(f"{otherwise}, it lacks {path}")
            found = found[key]
        if not isinstance(found, kind):
            raise RunnerError(f"{otherwise}, {path} is {found!r}")


def _check_curve(curve: Any, otherwise: str) -> None:
    require({"curve": curve}, {"curve.x": list, "curve.y": list, "curve.x_end": NUMBER, "curve.x_label": str,
                                "curve.x_unit": str}, otherwise)  # fmt: skip
    numbers = all(isinstance(each, NUMBER) for each in curve["y"]) and all(is_finite(each) for each in curve["x"])
    if not numbers or not curve["x"] or len(curve["x"]) != len(curve["y"]):
        raise RunnerError(f"{otherwise}: x and y are not numbers, as many of the one as of the other")


def _check_depths(test: Any, otherwise: str) -> None:
    """Of a test with the metric by depth, its length and the bins that a map is drawn of."""
    require({"test": test}, {"test": dict}, otherwise)
    require(test, {"by": dict} if "by" in test else {}, otherwise)
    if DEPTH not in test.get("by", {}):
        return
    parts = ("edges", "value", "count")
    require(test, {"length": NUMBER, **{f"by.{DEPTH}.{part}": list for part in parts}}, otherwise)
    edges, values, counts = (test["by"][DEPTH][part] for part in parts)
    given = [*edges, *counts, *(each for each in values if each is not None)]
    if not all(isinstance(each, NUMBER) for each in given) or not values or len(values) != len(counts):
        raise RunnerError(f"{otherwise}: by.{DEPTH} needs edges, and a value and a count for each bin between them")
    if len(edges) != len(values) + 1:
        raise RunnerError(f"{otherwise}: by.{DEPTH} has {len(edges)} edges for {len(values)} bins")
