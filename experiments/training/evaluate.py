"""Evaluates a model on a task: on the validation split while it trains, on the test splits once, at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.tasks import Task
from experiments.training.engine import Engine
from seqarch.models import LanguageModel


def evaluate_split(model: LanguageModel, task: Task, split: str, engine: Engine) -> dict[str, Any]:
    """The task's metrics on a whole split."""
    model.eval()
    parts = [(batch.targets, *engine.evaluate_batch(model, batch)) for batch in task.evaluation(split)]
    model.train()
    return task.score(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def evaluate_tests(model: LanguageModel, task: Task, engine: Engine) -> dict[str, Any]:
    """The results on every test split of a task.

    Returns:
        Of the split ``test``: its metric as ``test``, each other number as ``test_NAME``, and its ``curve`` if it has
        one. Of a task with several test splits also ``tests``, the numbers and the chance level of each with its
        ``length``, and as ``curve`` the metric along that length.
    """
    scores_of = {split: evaluate_split(model, task, split, engine) for split in task.tests}
    name, scores = task.metric.name, scores_of["test"]
    results = {"test": scores[name]}
    results |= {f"test_{key}": value for key, value in _numbers(scores).items() if key != name}
    curve = scores.get("curve")
    if len(scores_of) > 1:
        results["tests"] = {
            split: {"length": task.tests[split], "chance": task.chance(split)[0], **_numbers(each)}
            for split, each in scores_of.items()
        }
        curve = curve or along_length(results["tests"], name, task.length)
    return {**results, "curve": curve} if curve else results


def along_length(tests: Mapping[str, Mapping[str, float]], metric: str, trained_to: int) -> dict[str, Any]:
    """A curve of the metric, in the form of :meth:`Task.score`."""
    points = sorted((each["length"], each[metric]) for each in tests.values())
    return {
        "x": [length for length, _ in points],
        "y": [value for _, value in points],
        "x_end": points[-1][0],
        "x_label": "Length of the sequences",
        "x_unit": "tokens",
        "trained_to": trained_to,
    }


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, float)}
