"""The metric by what tells answers apart: by the gap to what is asked for, by its depth in the text, by position."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.tasks.task import IGNORED, UNGROUPED, Batch, Task

DEPTH = "depth"
"""The group that is a share, from 0 to 1, and has ten equal bins; the others count something, from 0 or 1 on."""

DEPTH_BINS = 10
DISTINCT = 16
"""Up to so many different numbers have a bin each."""

BINS_PER_OCTAVE = 2
DIGITS = 5

Grouped = dict[str, tuple[np.ndarray, np.ndarray]]
"""By group the numbers of some answers, and what each adds to the metric."""


def grouped(task: Task, batch: Batch, losses: np.ndarray, hits: np.ndarray) -> Grouped:
    """The answers of a batch by group, from the losses and hits ``[B, T]`` of a model."""
    if not batch.groups:
        return {}
    scores = task.answer_scores(batch.targets, losses, hits)
    found = {}
    for name, numbers in batch.groups.items():
        counts = (batch.targets != IGNORED) & (numbers != UNGROUPED)
        found[name] = numbers[counts], scores[counts].astype(np.float64)
    return found


def by_group(parts: Iterable[Grouped]) -> dict[str, dict[str, list[Any]]]:
    """The mean score of a split's answers in the bins of each group, for the records.

    Returns:
        By group ``edges``, one more than there are bins: a bin holds the numbers from its edge up to, but without, the
        next one; ``x``, by which a bin is drawn; ``value``, the metric over its answers, ``None`` where there are none;
        and ``count``, how many tokens were answered. Numbers have five digits.
    """
    collected: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for part in parts:
        for name, pair in part.items():
            collected.setdefault(name, []).append(pair)
    joined = {
        name: [np.concatenate(arrays) for arrays in zip(*pairs, strict=True)] for name, pairs in collected.items()
    }
    return {name: _binned(name, *arrays) for name, arrays in joined.items() if len(arrays[0])}


def _binned(name: str, numbers: np.ndarray, scores: np.ndarray) -> dict[str, list[Any]]:
    if name == DEPTH:
        edges = np.arange(DEPTH_BINS + 1) / DEPTH_BINS
        x = (edges[:-1] + edges[1:]) / 2
    else:
        edges, x = _counting_bins(numbers)
    place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(x) - 1)
    count = np.bincount(place, minlength=len(x))
    total = np.bincount(place, scores, minlength=len(x))
    values = [_short(part / number) if number else None for part, number in zip(total, count, strict=True)]
    return {
        "edges": [_short(edge) for edge in edges],
        "x": [_short(each) for each in x],
        "value": values,
        "count": count.tolist(),
    }


def _counting_bins(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges and places of the bins of whole numbers: each its own, or equally wide on a logarithmic axis.

    The logarithmic edges are the same for all data, 1, 2, 3, 4, 6, 8, 11, 16, ...; one that begins an empty bin is left
    out.
    """
    distinct = np.unique(numbers)
    last = distinct[-1] + 1
    if len(distinct) <= DISTINCT:
        return np.append(distinct, last), distinct
    steps = np.arange(int(np.ceil(np.log2(last) * BINS_PER_OCTAVE)) + 1)
    grid = np.unique(np.append(0, np.round(2 ** (steps / BINS_PER_OCTAVE)))).astype(np.int64)
    edges = np.append(grid[np.unique(np.searchsorted(grid, distinct, side="right") - 1)], last)
    # The middle of a bin's first and last number on a logarithmic axis.
    return edges, np.sqrt(edges[:-1] * (edges[1:] - 1.0))


def _short(number: float) -> float:
    short = float(f"{number:.{DIGITS}g}")
    return int(short) if short.is_integer() else short
