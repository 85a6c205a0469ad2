from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace

import pytest

from experiments.config.build import resolve
from experiments.config.convert import convert
from experiments.config.overrides import compose
from experiments.config.schema import NOT_IDENTITY, ModelConfig, TrainConfig, run_config, to_dict, without
from experiments.runs.folder import RunFolder
from experiments.sweeps.execute import resolve_composed
from experiments.tasks import TASKS
from experiments.util.errors import ConfigError
from seqarch.models import LMConfig
from tests.support.runs import tiny_config


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
        ("imports", ["no_such_package.parts"], ["imports: cannot import 'no_such_package.parts'", "PYTHONPATH"]),
        ("imports", "parts", ["imports: expected a list, got 'parts'"]),
        ("seed", -1, ["seed must be at least 0 and below 2^63, got -1"]),
        ("seed", 2**64, ["seed must be at least 0 and below 2^63"]),
        ("train.lr", float("inf"), ["train.lr: expected a finite number, got inf"]),
        pytest.param("task.power", 10**400, ["task.power: expected a finite number, got 1000"], id="beyond_floats"),
        ("train.lr", -1e-3, ["train: lr must be a finite number and not negative, got -0.001"]),
        ("train.target", float("nan"), ["train.target: expected a finite number, got nan"]),
        ("task.power", float("inf"), ["task.power: expected a finite number, got inf"]),
        ("train.warmup", 11, ["train: warmup must be at most steps (10), got 11"]),
        ("train.final_lr_ratio", 2, ["train: final_lr_ratio must be at most 1, got 2.0"]),
        ("train.threads", 10**5, ["threads must be at most 1024, got 100000"]),
        ("task.name", "mqra", ["task.name", "unknown task 'mqra'", "Did you mean 'mqar'?"]),
        ("task.pair", 2, ["task.pair", "unknown key", "Did you mean 'pairs'?"]),
        ("task.length", 2**70, ["task.length must be at most 2147483647, got 1180591620717411303424"]),
        ("task.test_lengths", [32, 2**62], ["task.test_lengths must be at most 2147483647"]),
        ("train.batch_size", 2**70, ["train: batch_size must be at most 2147483647"]),
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


def test_modules_to_import_are_imported_first_and_tell_no_runs_apart(tmp_path, monkeypatch):
    """What they register can be chosen in the same configuration."""
    monkeypatch.setitem(TASKS, "parity_again", None)  # Taken out again after the test.
    (tmp_path / "own_parts.py").write_text(
        "from experiments.tasks import TASKS\nTASKS['parity_again'] = TASKS['parity']"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = run_config({**plain(tmp_path), "imports": ["own_parts"], "task": {"name": "parity_again", "length": 8}})
    assert config.task.options.length == 8
    assert replace(config, imports=[]).folder() == config.folder()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__pattern": "atention"}, ["model", "atention", "Did you mean 'attention'?"]),
        ({"model__pattern": "attention mamba2", "model__depth": 3}, ["model", "depth of 3", "attention mamba2"]),
        ({"model__mixers": {"attention": {"num_heads": 5}}}, ["model", "num_heads (5)", "32"]),
        ({"model__mixers": {"attention": {"heads": 2}}}, ["model", "'heads'", "num_heads"]),
        ({"model__mixers": {"atention": {}}}, ["model.mixers.atention", "Did you mean 'attention'?"]),
        ({"model__mixers": {"mamba2": {"d_stat": 2}}}, ["mamba2", "'d_stat'", "d_state"]),
        ({"model__d_model": 2**30}, ["model", "Storage size calculation overflowed"]),
        ({"model__channel": "swigloo"}, ["model", "swigloo", "Did you mean 'swiglu'?"]),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(tmp_path, changes, told):
    with pytest.raises(ConfigError) as caught:
        tiny_config(tmp_path, **changes)
    for words in told:
        assert words in str(caught.value)


def test_warmup_and_decay_do_not_overlap(tmp_path):
    """The rate would jump down where the one ends."""
    with pytest.raises(ConfigError, match=r"warmup \(9\) and the 2 steps of decay_share \(0.2\) must fit into steps"):
        tiny_config(tmp_path, train__schedule="wsd", train__warmup=9)
    assert tiny_config(tmp_path, train__schedule="wsd", train__warmup=8).train.warmup == 8


@pytest.mark.parametrize(
    ("arguments", "warmup"),
    [
        ([], 50),
        (["train.steps=50"], 50),
        (["train.steps=1"], 1),
        (["train.steps=30", "train.schedule=wsd"], 24),
        (["train.steps=1", "train.schedule=wsd"], 0),
        (["train.steps=30", "train.warmup=7"], 7),
    ],
)
def test_a_short_run_warms_up_for_as_long_as_it_has(arguments, warmup):
    assert resolve_composed(compose(arguments)).train.warmup == warmup


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train.steps=30", "train.warmup=31"], "train: warmup must be at most steps"),
        (["train.steps=some"], "train.steps: expected an integer, got 'some'"),
        (["train.steps=0"], "train: steps must be at least 1"),
        (["train.steps=1", "train.spike=0.5"], "train: spike must be above 1"),
        (["train.stepz=1"], "train.stepz: unknown key"),
    ],
)
def test_what_was_given_is_told_and_not_the_warmup(arguments, told):
    with pytest.raises(ConfigError, match=told):
        resolve_composed(compose(arguments))


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


MEANT_ALIKE = {
    "an integer for a number": ({"rotary_base": 500}, {"rotary_base": 500.0}),
    "its default": ({"rotary_base": 10000, "conv_width": 4}, {"conv_width": 4}),
    "no options": ({"qk_norm": False}, None),
}


@pytest.mark.parametrize(("one", "other"), MEANT_ALIKE.values(), ids=MEANT_ALIKE)
def test_equal_options_of_a_mixer_are_one_run(tmp_path, one, other):
    given = [{} if options is None else {"attention": options} for options in (one, other)]
    pair = [tiny_config(tmp_path, model__mixers=mixers) for mixers in given]
    assert pair[0].folder() == pair[1].folder()
    RunFolder(pair[0].folder()).create(pair[0])
    RunFolder(pair[1].folder()).check(pair[1])


def test_equal_numbers_are_one_run(tmp_path):
    """Of training, of a task, of a channel mixer."""
    alike = [
        ({"train__lr": 1}, {"train__lr": 1.0}),
        ({"train__weight_decay": -0.0}, {"train__weight_decay": 0}),
        ({"task__power": 1}, {"task__power": 1.0}),
        ({"task__test_lengths": (24, 32)}, {"task__test_lengths": [24, 32]}),
        ({"model__logit_cap": 30}, {"model__logit_cap": 30.0}),
        ({"model__channel": "mlp", "model__channels": {"mlp": {"expansion": 2}}},
         {"model__channel": "mlp", "model__channels": {"mlp": {"expansion": 2.0}}}),
    ]  # fmt: skip
    for one, other in alike:
        assert tiny_config(tmp_path, **one).folder() == tiny_config(tmp_path, **other).folder(), one


def test_values_that_differ_are_two_runs(tmp_path):
    given = [{}, {"rotary_base": 500.0}, {"rotary_base": 501.0}, {"conv_width": 2}, {"qk_norm": True}]
    folders = {tiny_config(tmp_path, model__mixers={"attention": options}).folder() for options in given}
    assert len(folders) == len(given)


def test_a_run_that_an_earlier_version_made_is_found(tmp_path):
    """Its name was once the hash of its configuration as it was given, 2 apart from 2.0."""
    config = tiny_config(tmp_path, model__channel="mlp", model__channels={"mlp": {"expansion": 2}})
    text = json.dumps(without(to_dict(config), NOT_IDENTITY), sort_keys=True)
    before = config.folder().with_name(f"attention-seed0-{hashlib.sha256(text.encode()).hexdigest()[:10]}")
    assert config.folder() != before
    RunFolder(before).create(config)
    assert config.folder() == before
    RunFolder(before).check(config)


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
