"""Evaluates a model on a task: on the validation split while it trains, on the test splits once, at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.config.data import HeldOut
from experiments.tasks import Task
from experiments.tasks.groups import by_group, grouped
from experiments.training.engine import Engine
from experiments.util.items import encode_items
from seqarch.models import LanguageModel

MOST_ITEMS = 4096
"""Sequences of a test split up to which the score of each is kept."""


def evaluate_split(model: LanguageModel, task: Task, split: str, engine: Engine) -> dict[str, Any]:
    """The task's metrics on a whole split, and as ``by`` its metric by group.

    Of a test split also ``items``, each sequence's own by ``encode_items``.
    """
    model.eval()
    parts, groups = [], []
    for batch in task.evaluation(split):
        scored = engine.evaluate_batch(model, batch)
        parts.append((batch.targets, *scored))
        groups.append(grouped(task, batch, *scored))
    model.train()
    outputs = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    scores = task.score(*outputs)
    if split in task.tests and len(outputs[0]) <= MOST_ITEMS:
        scores["items"] = encode_items(task.item_scores(*outputs))
    by = by_group(groups)
    return {**scores, "by": by} if by else scores


def evaluate_tests(
    model: LanguageModel, tests: Mapping[str, HeldOut], engine: Engine, trained_to: int
) -> dict[str, Any]:
    """The results on every test split of a run.

    Args:
        tests: by name; ``test`` is the one that results are headed by.
        trained_to: tokens of the longest training sequence.

    Returns:
        Of the split ``test``: its metric as ``test``, each other number as ``test_NAME``, its ``curve`` and, as ``by``,
        its metric by group if it has them, and its ``items``. Of a run with several test splits also ``tests``: the
        numbers, the chance level, ``by`` and the ``items`` of each, those of ``test`` there alone, with its ``length``
        and the ``options`` in which it differs from the run's task (where it does in others than the lengths of the
        task's own tests); and as ``curve`` the metric along the length of those splits that differ in nothing else.
    """
    scores_of = {name: evaluate_split(model, each.task, each.split, engine) for name, each in tests.items()}
    name, scores = tests["test"].task.metric.name, scores_of["test"]
    results = {"test": scores[name]}
    results |= {f"test_{key}": value for key, value in _numbers(scores).items() if key != name}
    curve = scores.get("curve")
    if len(scores_of) > 1:
        results["tests"] = {
            split: {**_described(tests[split]), **_numbers(each), **_only(each, "items", "by")}
            for split, each in scores_of.items()
        }
        along = {split: results["tests"][split] for split, each in tests.items() if not {*each.overrides} - {"length"}}
        if len(along) > 1:
            curve = curve or along_length(along, name, trained_to)
    else:
        results |= _only(scores, "items")
    results |= _only(scores, "by")
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


def _described(held_out: HeldOut) -> dict[str, Any]:
    options = {"options": dict(held_out.overrides)} if held_out.overrides else {}
    return {"length": held_out.length, **options, "chance": held_out.task.chance(held_out.split)[0]}


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def _only(scores: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: scores[name] for name in names if name in scores}
