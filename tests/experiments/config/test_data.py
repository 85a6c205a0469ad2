"""What a run trains on and is tested on: which entries are refused, and how they are written."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from experiments.config.data import build_data
from experiments.config.overrides import compose
from experiments.config.schema import run_config, to_dict
from experiments.runs.folder import RunFolder
from experiments.sweeps.execute import resolve_composed
from experiments.tasks import TASKS
from experiments.tasks.parity import Parity, ParityConfig
from experiments.util.errors import ConfigError
from tests.support.runs import tiny_config

CURRICULUM = {"task__order": "curriculum", "train__schedule": "until_converged"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task__train_on": {"length": 8}}, "task.train_on: expected a list, got {'length': 8}"),
        ({"task__train_on": [8]}, "task.train_on[0]: expected a mapping, got 8"),
        ({"task__train_on": [{}, {"pair": 1}]}, "task.train_on[1].pair: unknown key, expected one of"),
        ({"task__train_on": [{"pairs": 1.5}]}, "task.train_on[0].pairs: expected an integer, got 1.5"),
        (
            {"task__train_on": [{"pairs": 9}]},
            "task.train_on[0]: length (16) must be even and at least 4",
        ),
        ({"task__train_on": [{"length": 2**40}]}, "task.train_on[0].length must be at most 2147483647"),
        (
            {"task__train_on": [{"vocab_size": 32}]},
            "task.train_on[0]: its vocabulary has 32 tokens, that of the task 16",
        ),
        ({"task__train_on": [{"test_lengths": [8]}]}, "task.train_on[0].test_lengths: the tests of a run are in"),
        ({"task__train_on": [{"share": 0}]}, "task.train_on[0]: share must be positive, got 0.0"),
        ({"task__train_on": [{"batch_size": -1}]}, "task.train_on[0]: batch_size must be from 1 to"),
        ({"task__train_on": [{"pairs": 1}, {"pairs": 1}]}, "task.train_on[1] is task.train_on[0] again"),
        ({"task__order": "mixed"}, "task.order is 'mixed', expected one of curriculum, mixture"),
        (CURRICULUM, "task.order: a curriculum needs entries in task.train_on"),
        ({**CURRICULUM, "task__train_on": [{"share": 2}]}, "task.train_on[0].share: a curriculum takes its entries"),
        (
            {"task__order": "curriculum", "task__train_on": [{}]},
            "it needs train.schedule: until_converged, got 'cosine'",
        ),
        (
            {"train__stage_target": 0.5},
            "train.stage_target is of the stages of a curriculum, and task.order is 'mixture'",
        ),
        ({"train__stage_warmup": 1}, "train.stage_warmup is of the stages of a curriculum"),
        (
            {**CURRICULUM, "task__train_on": [{}], "train__stage_warmup": 6},
            "stage_warmup must be at most eval_every (5)",
        ),
        ({"train__bptt": -1}, "bptt must be a finite number and not negative"),
        ({"task__test_on": [{}]}, "task.test_on[0] is the task as it is, which the split test is of"),
        ({"task__test_on": [{"length": 16}]}, "task.test_on[0] is the task as it is"),
        ({"task__test_on": [{"pairs": 1}, {"pairs": 1}]}, "task.test_on[1] is the split test_pairs_1, which there is"),
        (
            {"task__test_lengths": [32], "task__test_on": [{"length": 32}]},
            "task.test_on[0] is the split test_32, which there is already",
        ),
        (
            {"task__train_on": [{"length": 48}], "machine__processes": 2},
            "task.train_on[0]: its batch_size is 3, machine.processes 2: every process has to get the same number",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else re.sub(r"\W+", "_", value)[:40],
)
def test_what_cannot_be_is_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny_config(tmp_path, **changes)


def test_a_vocabulary_that_follows_from_the_length_is_one_for_all(tmp_path):
    task = {"name": "compression", "length": 16}
    with pytest.raises(ConfigError, match=r"task.test_on\[0\]: its vocabulary has 20 tokens, that of the task 24"):
        tiny_config(tmp_path, task={**task, "test_on": [{"length": 8}]})


def test_entries_are_written_as_they_were_given_and_equal_ones_are_one_run(tmp_path):
    given = {"task__train_on": [{"power": 1, "length": 32, "share": 2}, {}], "task__test_on": [{"pairs": 1}]}
    config = tiny_config(tmp_path, **given)
    written = to_dict(config)["task"]
    assert written["train_on"] == [{"length": 32, "power": 1.0, "share": 2.0}, {}]
    assert (written["order"], written["test_on"]) == ("mixture", [{"pairs": 1}])
    assert run_config(to_dict(config)) == config
    other = {"task__train_on": [{"length": 32, "power": 1.0, "share": 2.0}, {"batch_size": 0}]}
    assert tiny_config(tmp_path, **{**given, **other}).folder() == config.folder()
    for key in given:
        assert tiny_config(tmp_path, **{name: value for name, value in given.items() if name != key}) != config
    RunFolder(config.folder()).create(config)
    assert RunFolder(config.folder()).config() == config


def test_they_can_be_given_on_the_command_line():
    given = ["task.train_on=[{length:32,share:2},{}]", "task.test_on=[{length:128,pairs:8}]", "train.bptt=16"]
    config = resolve_composed(compose(given))
    assert [entry.plain() for entry in config.task.train_on] == [{"length": 32, "share": 2.0}, {}]
    assert (config.task.test_on, config.train.bptt) == ([{"length": 128, "pairs": 8}], 16)


def test_runs_without_any_of_it_are_what_they_were(tmp_path):
    """In their configurations, and so in the names of their folders, nothing is there."""
    written = to_dict(tiny_config(tmp_path))
    assert not {"train_on", "order", "test_on"} & written["task"].keys()
    assert not {"bptt", "stage_target", "stage_warmup", "start_from", "start_sha256"} & written["train"].keys()


@dataclass(frozen=True)
class OwnConfig(ParityConfig):
    batch_size: int = 3


def test_a_task_of_ones_own_may_be_trained_at_other_options(tmp_path, monkeypatch):
    class Own(Parity):
        name = "own"

    class WithSuchAnOption(Own):
        Config = OwnConfig

    monkeypatch.setitem(TASKS, "own", Own)
    task = {"name": "own", "length": 8, "test_lengths": [40]}
    data = build_data(tiny_config(tmp_path, task={**task, "train_on": [{"length": 40}], "test_on": [{"length": 64}]}))
    assert type(data.sources[0].task) is Own
    assert (data.longest, data.trained_to, [*data.tests]) == (64, 40, ["test", "test_40", "test_64"])
    monkeypatch.setitem(TASKS, "own", WithSuchAnOption)
    with pytest.raises(ConfigError, match=r"task.train_on\[0\]: batch_size is of the entry, and the task own has an"):
        tiny_config(tmp_path, task={**task, "train_on": [{}]})
