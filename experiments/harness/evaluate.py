"""The tasks of the harness by name, and what a model reaches on them."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from experiments.harness.adapter import SeqarchLM
from experiments.util.errors import RunnerError

SEED = 1234
"""Of few-shot examples and of sampling."""

NEAR = 5
"""Names that are shown where a task is not known: there are some 14,000."""


def task_manager(names: Sequence[str], include: Sequence[Path], metadata: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The harness's index of tasks, and the names of those that are asked for, patterns such as ``mmlu_*`` resolved.

    Where each is a task of the folders ``include``, the harness's own, whose listing takes seconds, are not listed.

    Raises:
        RunnerError: a folder is not there, or there is no task, group or tag of a name.
    """
    for folder in include:
        if not folder.is_dir():
            raise RunnerError(f"{folder} is no folder; --include-path names one that holds yaml files of tasks")
    paths: Any = [str(folder) for folder in include]
    if paths:
        own = TaskManager(include_path=paths, include_defaults=False, metadata=dict(metadata))
        if set(names) <= set(own.all_subtasks):
            return own, [*names]
    every = TaskManager(include_path=paths or None, metadata=dict(metadata))
    found = [match for name in names for match in _matches(name, every)]
    return every, [*dict.fromkeys(found)]


def _matches(name: str, manager: TaskManager) -> list[str]:
    matches = manager.match_tasks([name])
    if not matches:
        near = difflib.get_close_matches(name, manager.all_tasks, n=NEAR, cutoff=0.5)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise RunnerError(f"lm-eval has no task, group or tag {name!r}{hint}; --include-path adds tasks of your own")
    return sorted(matches)


def scores(
    lm: SeqarchLM, manager: Any, names: Sequence[str], limit: float | None, shots: int | None
) -> dict[str, dict[str, Any]]:
    """By task and group: its version, shots, number of texts, and each metric's value and standard error.

    Args:
        limit: texts of each task, or, below 1, their share; by default all.
        shots: examples before each question, where a task does not fix their number at 0; by default its own number.

    Raises:
        RunnerError: a task cannot be loaded, as where its data are not here and cannot be fetched.
    """
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        loaded = manager.load([*names])
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=own if own == 0 or shots is None else shots)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        found = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False)  # type: ignore[arg-type]
    except (OSError, ImportError, ValueError, KeyError, AssertionError) as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise RunnerError(f"lm-eval cannot run {', '.join(names)}: {type(error).__name__}: {first}") from error
    return _by_task(found or {})


def _by_task(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    counts, better = found.get("n-samples", {}), found.get("higher_is_better", {})
    result = {}
    for name, values in {**found.get("results", {}), **found.get("groups", {})}.items():
        metrics = dict(_metrics(values, better.get(name) or {}))
        if metrics:
            result[name] = {
                "version": found.get("versions", {}).get(name),
                "shots": found.get("n-shot", {}).get(name),
                "texts": counts.get(name, {}).get("effective", values.get("sample_len", values.get("sample_count"))),
                "metrics": metrics,
            }
    return result


def _metrics(values: Mapping[str, Any], better: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """``metric`` or, of another filter than none, ``metric (filter)``, each with its value and its standard error."""
    for key, value in values.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{kept}")
        stderr = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None
        name = metric if kept == "none" else f"{metric} ({kept})"
        yield name, {"value": float(value), "stderr": stderr, "higher_is_better": better.get(metric)}


def harness_version() -> str:
    return version("lm_eval")
