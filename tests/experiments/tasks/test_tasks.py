from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from experiments.tasks import TASKS
from experiments.tasks.generated import GeneratedTask
from experiments.tasks.task import IGNORED
from tests.support.small_tasks import CHANCES, SMALL
from tests.support.solvers import SOLVERS, solve

GENERATED = [name for name, task in TASKS.items() if issubclass(task, GeneratedTask)]


def splits(task, seed=0):
    held_out = [batch.tokens for split in ("validation", *task.tests) for batch in task.evaluation(split)]
    return task.train_batch(seed, 0, 64).tokens, *held_out


def test_every_task_is_tried_here():
    assert SMALL.keys() == TASKS.keys()
    assert SOLVERS.keys() == CHANCES.keys() == set(GENERATED)


@pytest.mark.parametrize("name", TASKS)
class TestEveryTask:
    def test_shapes_and_ranges(self, tasks, name):
        task = tasks[name]
        held_out = {split: next(task.evaluation(split)) for split in ("validation", *task.tests)}
        for batch in (task.train_batch(0, 0, 5), *held_out.values()):
            assert batch.tokens.dtype == batch.targets.dtype == np.int64
            assert batch.tokens.shape == batch.targets.shape
            assert batch.tokens.min() >= 0
            assert batch.tokens.max() < task.vocab_size
            asked = batch.targets[batch.targets != IGNORED]
            assert len(asked) > 0
            assert asked.min() >= 0
            assert asked.max() < task.vocab_size
            if batch.token_mask is not None:
                assert (batch.token_mask.dtype, batch.token_mask.shape) == (np.bool_, batch.tokens.shape)
                assert (np.diff(batch.token_mask.astype(int), axis=1) <= 0).all()
                assert (batch.targets[~batch.token_mask] == IGNORED).all()
        assert task.train_batch(0, 0, 5).tokens.shape == (5, task.length)
        assert next(iter(task.tests)) == "test"
        assert {split: held_out[split].tokens.shape[1] for split in task.tests} == task.tests
        assert max(task.tests.values()) == task.longest

    def test_what_is_said_to_be_bytes_is_a_text(self, tasks, name):
        task = tasks[name]
        if task.tokens is None:
            return
        assert task.tokens == "bytes"
        assert task.vocab_size in (256, 257)
        for row in task.train_batch(0, 0, 20).tokens:
            read = bytes(row[row < 256].tolist()).decode("utf-8", errors="ignore")
            assert len(read.encode()) > 0.9 * len(row[row < 256])

    def test_padding_is_distinct_from_filler(self, tasks, name):
        """Padding follows the end of a formula, a copy or a file; blanks between a task's tokens belong to it."""
        batch = tasks[name].train_batch(0, 0, 100)
        assert (batch.token_mask is not None) == (name in ("listops", "copying", "stdlib_text", "corpus_text"))
        if name in ("listops", "copying"):
            assert not batch.token_mask.all()
            assert batch.token_mask[batch.targets != IGNORED].all()

    def test_an_example_depends_on_seed_and_index_alone(self, tasks, name):
        whole = tasks[name].train_batch(3, 0, 12)
        fresh = TASKS[name](SMALL[name])
        parts = [fresh.train_batch(3, start, size) for start, size in ((7, 5), (0, 3), (3, 4))]
        order = [parts[1], parts[2], parts[0]]
        for kind in (0, 1):
            assert np.array_equal(whole[kind], np.concatenate([part[kind] for part in order]))

    def test_seeds_and_indices_differ(self, tasks, name):
        task = tasks[name]
        first = task.train_batch(0, 0, 8).tokens
        assert not np.array_equal(first, task.train_batch(1, 0, 8).tokens)
        assert not np.array_equal(first, task.train_batch(0, 8, 8).tokens)
        assert len({row.tobytes() for row in task.train_batch(0, 0, 64).tokens}) > 60

    def test_no_example_is_in_two_splits(self, tasks, name):
        rows = [{row.tobytes() for row in tokens} for tokens in splits(tasks[name])]
        assert all(rows)
        assert sum(map(len, rows)) == len(set.union(*rows))

    def test_the_score_of_a_split_is_the_mean_of_its_sequences(self, tasks, name):
        """Weighted by their targets, where some have more of them."""
        task, rng = tasks[name], np.random.default_rng(0)
        targets = np.concatenate([batch.targets for batch in task.evaluation("test")])
        losses, hits = rng.random(targets.shape) * 3, rng.random(targets.shape) < 0.7
        items = task.item_scores(targets, losses, hits)
        answers = (targets != IGNORED).sum(axis=1)
        assert (items.shape, items.dtype) == ((len(targets),), np.float64)
        assert np.average(items, weights=answers) == pytest.approx(task.score(targets, losses, hits)[task.metric.name])
        for row in (0, len(targets) - 1):
            alone = task.score(*(array[row : row + 1] for array in (targets, losses, hits)))
            assert items[row] == pytest.approx(alone[task.metric.name])

    def test_held_out_data_is_the_same_every_time(self, tasks, name):
        again = TASKS[name](SMALL[name])
        for split in ("validation", *again.tests):
            pairs = zip(tasks[name].evaluation(split), again.evaluation(split), strict=True)
            assert all(np.array_equal(one.tokens, other.tokens) for one, other in pairs)
        assert tasks[name].manifest() == again.manifest()
        assert len(again.manifest()["hash"]) == 64

    def test_perfect_and_uniform_predictions_score_as_they_must(self, tasks, name):
        task = tasks[name]
        targets = np.concatenate([batch.targets for batch in task.evaluation("test")])
        asked = targets != IGNORED
        perfect = task.score(targets, np.zeros(targets.shape), asked)
        assert perfect["loss"] == 0
        assert perfect["accuracy"] == 1
        uniform = task.score(targets, np.where(asked, math.log(task.vocab_size), 0), np.zeros(targets.shape, bool))
        assert uniform["loss"] == pytest.approx(math.log(task.vocab_size))
        worse, better = uniform[task.metric.name], perfect[task.metric.name]
        assert (better > worse) == task.metric.higher_is_better


@pytest.mark.parametrize("name", GENERATED)
class TestEveryGeneratedTask:
    def test_its_solver_is_always_right(self, tasks, name):
        task = tasks[name]
        held_out = [next(task.evaluation(split)) for split in ("validation", *task.tests)]
        for batch in (task.train_batch(5, 0, 200), *held_out):
            answers = solve(name, batch, task.config)
            scores = task.score(batch.targets, np.zeros(batch.targets.shape), answers == batch.targets)
            assert scores["accuracy"] == scores["sequence_accuracy"] == 1
            assert (answers[batch.targets != IGNORED] != IGNORED).all()

    def test_chance_is_measured(self, tasks, name):
        """On as many examples as are asked for, and near what it must be; longer tests have their own."""
        task = TASKS[name](replace(SMALL[name], test_examples=2000))
        value, words = task.chance()
        assert value == pytest.approx(CHANCES[name], abs=0.015)
        assert words
        assert all(0 <= tasks[name].chance(split)[0] < 0.7 for split in task.tests)

    def test_examples_are_made_in_less_than_a_millisecond(self, tasks, name):
        task = tasks[name]
        task.train_batch(0, 0, 64)
        seconds = []
        for _ in range(5):
            begin = time.process_time()
            task.train_batch(0, 0, 64)
            seconds.append(time.process_time() - begin)
        assert min(seconds) / 64 < 1e-3

    def test_lengths_to_test_at_are_other_lengths(self, name):
        config = SMALL[name]
        with pytest.raises(ValueError, match="test_lengths must be lengths other than length"):
            replace(config, test_lengths=[config.length])
        with pytest.raises(ValueError, match="length"):
            replace(config, test_lengths=[0])
        with pytest.raises(ValueError, match="test_examples must be at least 1"):
            replace(config, test_examples=0)
