from __future__ import annotations

from dataclasses import fields

import pytest

from experiments.building import resolve
from experiments.config import ModelConfig, TrainConfig, run_config, to_dict
from experiments.errors import ConfigError
from experiments.strict import convert
from seqarch.models import LMConfig

from .conftest import tiny_config


def plain(tmp_path):
    return to_dict(tiny_config(tmp_path))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("train.lrr", 1.0, ["train.lrr", "unknown key", "Did you mean 'lr'?"]),
        ("train.lr", "fast", ["train.lr", "expected a number", "'fast'"]),
        ("train.steps", True, ["train.steps", "expected an integer", "True"]),
        ("train.steps", 1.5, ["train.steps", "expected an integer", "1.5"]),
        ("train.steps", 0, ["train", "steps must be at least 1, got 0"]),
        ("train.select", "bset", ["train", "'bset'", "Did you mean 'best'?"]),
        ("sed", 1, ["sed", "unknown key", "Did you mean 'seed'?"]),
        ("seed", -1, ["seed must be at least 0 and below 2^63, got -1"]),
        ("seed", 2**64, ["seed must be at least 0 and below 2^63"]),
        ("train.lr", float("inf"), ["lr must be a finite number and not negative, got inf"]),
        ("train.target", float("nan"), ["target must be a finite number or null, got nan"]),
        ("train.threads", 10**5, ["threads must be at most 1024, got 100000"]),
        ("task.name", "mqra", ["task.name", "unknown task 'mqra'", "Did you mean 'mqar'?"]),
        ("task.pair", 2, ["task.pair", "unknown key", "Did you mean 'pairs'?"]),
        ("task.pairs", 5, ["task", "length (16)", "4 * pairs"]),
        ("tracker.name", "wandbb", ["tracker", "'wandbb'", "Did you mean 'wandb'?"]),
        ("tracker.options", {"projet": "x"}, ["tracker.options.projet", "nothing can be set here"]),
        ("tracker", {"name": "wandb", "options": {"projet": "x"}}, ["tracker.options.projet", "mean 'project'?"]),
        ("tracker", {"name": "wandb", "options": {"mode": "onlin"}}, ["tracker.options", "mean 'online'?"]),
        ("tracker", {"name": "wandb", "options": {"tags": ["a", 1]}}, ["tracker.options.tags[1]", "expected text"]),
        ("tracker", {"name": "wandb", "options": {"tags": "a"}}, ["tracker.options.tags", "expected a list"]),
        ("tracker.nam", "wandb", ["tracker.nam", "Did you mean 'name'?"]),
        ("model.pattern", 3, ["model.pattern", "expected text"]),
        ("model.mixers", {"attention": 2}, ["model.mixers.attention", "expected a mapping"]),
        ("model", "attention", ["model", "expected a mapping"]),
        ("experiment", "../elsewhere", ["experiment", "'../elsewhere'"]),
        ("machine.processes", 3, ["train.batch_size is 8, machine.processes 3", "the same number"]),
    ],
)
def test_a_wrong_value_is_named_by_its_path(tmp_path, path, value, told):
    config = plain(tmp_path)
    *parts, last = path.split(".")
    target = config
    for part in parts:
        target = target[part]
    target[last] = value
    with pytest.raises(ConfigError) as caught:
        run_config(config)
    for words in told:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__pattern": "atention"}, ["model", "atention", "Did you mean 'attention'?"]),
        ({"model__pattern": "attention mamba2", "model__depth": 3}, ["model", "depth of 3", "attention mamba2"]),
        ({"model__mixers": {"attention": {"num_heads": 5}}}, ["model", "num_heads (5)", "32"]),
        ({"model__mixers": {"attention": {"heads": 2}}}, ["model", "'heads'", "num_heads"]),
        ({"model__mixers": {"atention": {}}}, ["model.mixers.atention", "Did you mean 'attention'?"]),
        ({"model__mixers": {"mamba2": {"d_stat": 2}}}, ["mamba2", "'d_stat'", "d_state"]),
        ({"model__channel": "swigloo"}, ["model", "swigloo", "Did you mean 'swiglu'?"]),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(tmp_path, changes, told):
    with pytest.raises(ConfigError) as caught:
        tiny_config(tmp_path, **changes)
    for words in told:
        assert words in str(caught.value)


def test_a_missing_key_is_named(tmp_path):
    config = plain(tmp_path)
    del config["train"]["steps"]
    with pytest.raises(ConfigError, match=r"train\.steps: missing"):
        run_config(config)


def test_what_is_written_reads_back(tmp_path):
    config = tiny_config(tmp_path, train__target=0.5)
    assert run_config(to_dict(config)) == config


def test_an_integer_serves_as_a_number():
    config = convert(TrainConfig, {"steps": 1, "batch_size": 1, "lr": 1, "target": None})
    assert (config.lr, type(config.lr)) == (1.0, float)


def test_options_of_mixers_not_in_the_pattern_change_nothing(tmp_path):
    used = {"attention": {"num_heads": 2}}
    both = used | {"mamba2": {"d_state": 8}}
    assert tiny_config(tmp_path, model__mixers=both) == tiny_config(tmp_path, model__mixers=used)


def test_the_folder_names_what_changes_results_and_nothing_else(tmp_path):
    folder = tiny_config(tmp_path).folder()
    assert folder.parent == tmp_path / "tiny"
    assert folder.name.startswith("attention-seed0-")
    assert tiny_config(tmp_path).folder() == folder
    assert tiny_config(tmp_path, tracker__name="wandb").folder() == folder
    assert tiny_config(tmp_path / "other").folder().name == folder.name
    changed = [{"seed": 1}, {"train__lr": 2e-3}, {"task__power": 0.1}, {"model__depth": 2}, {"train__threads": 2}]
    assert len({tiny_config(tmp_path, **change).folder() for change in changed} | {folder}) == len(changed) + 1


def test_resolving_twice_is_resolving_once(tmp_path):
    config = tiny_config(tmp_path, model__mixers={"attention": {"num_heads": 2}, "mamba2": {}})
    assert resolve(config) == config


def test_every_option_of_a_language_model_but_its_vocabulary_can_be_configured():
    """With the same defaults: a run and the library mean the same by saying nothing."""
    library = {option.name: option for option in fields(LMConfig) if option.name != "vocab_size"}
    runner = {option.name: option for option in fields(ModelConfig) if option.name != "name"}
    assert runner.keys() == library.keys()
    assert all(runner[name].default == library[name].default for name in library)
