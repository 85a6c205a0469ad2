"""Groups say where an answer was shown, and results are the metric in their bins."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.tasks import TASKS
from experiments.tasks.groups import by_group, grouped
from experiments.tasks.needle_text import NeedleText
from experiments.tasks.task import IGNORED, UNGROUPED
from tests.support.small_tasks import GROUPS, SMALL

BY_GAP = [name for name, groups in GROUPS.items() if "gap" in groups]


def answers(task, split="test"):
    """Each batch of a split with the answers of a model that is right at every other one."""
    generator = np.random.default_rng(0)
    for batch in task.evaluation(split):
        hits = (generator.random(batch.targets.shape) < 0.5) & (batch.targets != IGNORED)
        yield batch, np.where(hits, 0.0, 1.0), hits


def test_every_task_is_named_here():
    assert GROUPS.keys() == TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
class TestEveryTask:
    def test_its_groups_are_numbers_for_all_that_is_asked(self, tasks, name):
        for batch in (tasks[name].train_batch(0, 0, 20), next(tasks[name].evaluation("test"))):
            groups = batch.groups or {}
            assert set(groups) == set(GROUPS[name])
            for group, numbers in groups.items():
                asked = numbers[batch.targets != IGNORED]
                assert numbers.shape == batch.targets.shape
                assert asked.min() >= (0 if group in ("depth", "hops", "updated") else 1)
                assert group != "depth" or (asked.max() <= 1 and len(np.unique(asked)) > 5)
            assert {each: numbers[2:5].tolist() for each, numbers in groups.items()} == {
                each: numbers.tolist() for each, numbers in (batch.rows(slice(2, 5)).groups or {}).items()
            }

    def test_means_over_its_bins_give_the_metric(self, tasks, name):
        task = tasks[name]
        scored = list(answers(task))
        by = by_group(grouped(task, *each) for each in scored)
        targets, losses, hits = (
            np.concatenate(arrays) for arrays in zip(*((batch.targets, *each) for batch, *each in scored), strict=True)
        )
        assert set(by) == set(GROUPS[name])
        assert json.loads(json.dumps(by)) == by
        for bins in by.values():
            assert sum(bins["count"]) == (targets != IGNORED).sum()
            assert len(bins["x"]) == len(bins["value"]) == len(bins["edges"]) - 1
            assert bins["edges"] == sorted(set(bins["edges"]))
            total = sum(value * count for value, count in zip(bins["value"], bins["count"], strict=True) if count)
            mean = total / sum(bins["count"])
            assert mean == pytest.approx(task.score(targets, losses, hits)[task.metric.name], abs=1e-4)


@pytest.mark.parametrize("name", BY_GAP)
def test_so_many_tokens_ago_the_answer_was_shown(tasks, name):
    batch = tasks[name].train_batch(1, 0, 100)
    rows, places = np.nonzero(batch.targets != IGNORED)
    gap = batch.groups["gap"][rows, places]
    assert np.array_equal(batch.tokens[rows, places - gap], batch.targets[rows, places])


def test_a_needles_depth_is_where_it_lies(tasks):
    task = tasks["needle"]
    for batch in (task.train_batch(0, 0, 200), next(task.evaluation("test_700"))):
        for row, tokens in enumerate(batch.tokens):
            text = bytes(tokens.astype(np.uint8))
            asked = batch.targets[row] != IGNORED
            for place, depth in zip(np.flatnonzero(asked), batch.groups["depth"][row, asked], strict=True):
                question = text.rindex(b"The number of", 0, place + 1)
                begins = text.index(text[question : question + 19])
                # Behind the haystack stand two questions, the last one without its full stop.
                end = len(tokens) + 1 + 2 - 2 * 29
                assert depth == pytest.approx(begins / (end - 29))


def test_positions_and_pairs_count_what_came_before(tasks):
    batch = tasks["copying"].train_batch(0, 0, 50)
    asked = batch.targets != IGNORED
    assert np.array_equal(batch.groups["position"][asked], np.cumsum(asked, axis=1)[asked])
    batch = tasks["selective_copying"].train_batch(0, 0, 50)
    asked = batch.targets != IGNORED
    assert np.array_equal(batch.groups["position"][asked], np.cumsum(asked, axis=1)[asked])
    batch = tasks["noisy_recall"].train_batch(0, 0, 50)
    for row, tokens in enumerate(batch.tokens):
        keys = [set(tokens[:place:2][tokens[:place:2] < 4]) for place in range(len(tokens))]
        asked = np.flatnonzero(batch.targets[row] != IGNORED)
        assert batch.groups["pairs"][row, asked].tolist() == [len(keys[place]) for place in asked]
    batch = tasks["listops"].train_batch(0, 0, 20)
    whole = np.argmax(np.cumsum(batch.token_mask, axis=1), axis=1)
    assert np.array_equal(batch.groups["size"][np.arange(20), whole], batch.token_mask.sum(axis=1))


def test_few_numbers_have_a_bin_each_and_many_logarithmic_ones(tasks):
    def binned(name, numbers, scores):
        return by_group([{name: (np.array(numbers), np.array(scores, dtype=float))}])[name]

    few = binned("gap", [3, 9, 3, 9, 40], [1, 0, 0, 0, 1])
    assert few == {"edges": [3, 9, 40, 41], "x": [3, 9, 40], "value": [0.5, 0, 1], "count": [2, 2, 1]}
    many = binned("gap", np.arange(1, 101), np.arange(1, 101) < 24)
    assert many["edges"] == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 101]
    assert many["value"] == [1] * 8 + [round(1 / 9, 5)] + [0] * 4
    assert many["x"][:5] == [1, 2, 3, 4.4721, 6.4807]
    odd = binned("gap", np.arange(1, 101, 2), np.ones(50))
    assert odd["edges"][:3] == [1, 3, 4]
    assert min(odd["count"]) > 0
    depth = binned("depth", [0.0, 0.05, 0.1, 1.0], [1, 0, 1, 1])
    assert depth["edges"] == [round(0.1 * edge, 1) for edge in range(11)]
    assert depth["value"] == [0.5, 1, *[None] * 7, 1]
    assert depth["count"] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_only_answers_are_grouped_where_all_bytes_are_predicted(tasks):
    alone, task = tasks["needle_text"], NeedleText(replace(SMALL["needle_text"], predict="all"))
    bins, all_bytes = (by_group(grouped(each, *scored) for scored in answers(each)) for each in (alone, task))
    assert {name: each["count"] for name, each in bins.items()} == {
        name: each["count"] for name, each in all_bytes.items()
    }
    batch, losses, hits = next(answers(task))
    assert (batch.groups["gap"] == UNGROUPED).mean() > 0.9
    assert by_group([grouped(task, batch._replace(groups=None), losses, hits)]) == {}
