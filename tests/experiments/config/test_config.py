from __future__ import annotations

import json
import re
from dataclasses import fields, replace

import pytest

from experiments.config.build import resolve
from experiments.config.convert import convert
from experiments.config.names import placed
from experiments.config.options import ALWAYS
from experiments.config.overrides import compose
from experiments.config.schema import FORMAT, TrainConfig, run_config, to_dict
from experiments.runs.folder import RunFolder
from experiments.runs.recorded import find_runs
from experiments.sweeps.execute import resolve_composed
from experiments.tasks import TASKS
from experiments.util.errors import ConfigError, RunnerError
from seqarch.models import LMConfig
from tests.support.runs import tiny_config


def plain(tmp_path):
    return to_dict(tiny_config(tmp_path))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.lrr", 1.0, ["train.lrr", "unknown key", "Did you mean 'lr'?"]),
        ("train.lr", "fast", ["train.lr", "expected a number", "'fast'"]),
        ("train.steps", True, ["train.steps", "expected an integer", "True"]),
        ("train.steps", 1.5, ["train.steps", "expected an integer", "1.5"]),
        ("train.steps", 0, ["train", "steps must be at least 1, got 0"]),
        ("train.eval_checkpoint", "bset", ["train", "'bset'", "Did you mean 'best'?"]),
        ("sed", 1, ["sed", "unknown key", "Did you mean 'seed'?"]),
        ("imports", ["no_such_package.parts"], ["imports: cannot import 'no_such_package.parts'", "PYTHONPATH"]),
        ("imports", [".parts"], ["imports: expected names of modules", "'.parts'"]),
        ("imports", [""], ["imports: expected names of modules", "''"]),
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
def test_a_wrong_value_is_named_by_its_path(tmp_path, path, value, message):
    config = plain(tmp_path)
    *parts, last = path.split(".")
    target = config
    for part in parts:
        target = target[part]
    target[last] = value
    with pytest.raises(ConfigError) as caught:
        run_config(config)
    for words in message:
        assert words in str(caught.value)


def test_modules_to_import_are_imported_first_and_tell_no_runs_apart(tmp_path, monkeypatch):
    """A configuration can choose its own imports' entries."""
    monkeypatch.setitem(TASKS, "parity_again", None)  # Taken out again after the test.
    (tmp_path / "own_parts.py").write_text(
        "from experiments.tasks import TASKS\nTASKS['parity_again'] = TASKS['parity']"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = run_config({**plain(tmp_path), "imports": ["own_parts"], "task": {"name": "parity_again", "length": 8}})
    assert config.task.options.length == 8
    assert replace(config, plugins=[]).folder() == config.folder()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__pattern": "atention"}, ["model", "atention", "Did you mean 'attention'?"]),
        ({"model__pattern": "attention mamba2", "model__depth": 3}, ["model", "depth of 3", "attention mamba2"]),
        ({"model__pattern": "attention(windo=4)"}, ["model.pattern", "attention", "windo", "Did you mean 'window'?"]),
        ({"model__pattern": "attention/swiglu(hidden=-1)"}, ["model.pattern", "swiglu", "hidden", "got -1"]),
        ({"model__pattern": "attention(window=4"}, ["model.pattern", "options of attention: expected ',' or ')'"]),
        ({"model__norm_placement": "before"}, ["model", "placement of norms", "both, none, post, pre"]),
        ({"model__mixers": {"attention": {"num_heads": 5}}}, ["model", "num_heads (5)", "32"]),
        ({"model__mixers": {"attention": {"heads": 2}}}, ["model", "'heads'", "num_heads"]),
        ({"model__mixers": {"atention": {}}}, ["model.mixers.atention", "Did you mean 'attention'?"]),
        ({"model__mixers": {"mamba2": {"d_stat": 2}}}, ["mamba2", "'d_stat'", "d_state"]),
        ({"model__d_model": 2**30}, ["model", "Storage size calculation overflowed"]),
        ({"model__channel": "swigloo"}, ["model", "swigloo", "Did you mean 'swiglu'?"]),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        tiny_config(tmp_path, **changes)
    for words in message:
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
    ("arguments", "message"),
    [
        (["train.steps=30", "train.warmup=31"], "train: warmup must be at most steps"),
        (["train.steps=some"], "train.steps: expected an integer, got 'some'"),
        (["train.steps=0"], "train: steps must be at least 1"),
        (["train.steps=1", "train.spike=0.5"], "train: spike must be above 1"),
        (["train.stepz=1"], "train.stepz: unknown key"),
    ],
)
def test_the_error_names_what_was_given_and_not_the_warmup(arguments, message):
    with pytest.raises(ConfigError, match=message):
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


@pytest.mark.parametrize("format", [None, FORMAT - 1, FORMAT + 1, "2"])
def test_a_folder_of_another_format_is_named(tmp_path, format):
    """Its configuration and its record; the first format did not say which it was."""
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    folder.update(format=FORMAT, status="failed")
    assert folder.status() == "failed"
    for file, read in ((folder.config_file, folder.config), (folder.run_file, folder.record)):
        stored = {**json.loads(file.read_text()), "format": format}
        file.write_text(
            json.dumps(stored if format is not None else {k: v for k, v in stored.items() if k != "format"})
        )
        message = f"{file} is of format {format or 1!r}, and this version of the runner reads {FORMAT}"
        with pytest.raises(RunnerError, match=re.escape(message)):
            read()
    with pytest.raises(RunnerError, match=r"config\.json is of format"):
        folder.check(config)
    (listed,) = find_runs(tmp_path)
    assert (listed.status, (listed.problem or "").partition(" is of format")[0]) == ("damaged", str(folder.run_file))


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


def test_an_option_that_came_later_changes_no_folder_until_it_is_used(tmp_path):
    """Records from before it are of the same run, and are found by the digits of its identity."""
    config = tiny_config(tmp_path)
    assert config.identity()["model"].keys() == {"name", *ALWAYS} - {"vocab_size"}
    plain = {field.name: getattr(config.model.options, field.name) for field in fields(LMConfig)}
    for option, value in plain.items():
        if option not in ALWAYS:
            assert tiny_config(tmp_path, **{f"model__{option}": value}).digest() == config.digest()
    given = {"logit_scale": 0.5, "zero_centred_norms": True, "output_factors": {"attention": 2.0}}
    for option, value in {**given, "norm": "layer", "norm_placements": {"attention": "post"}}.items():
        used = tiny_config(tmp_path, **{f"model__{option}": value})
        assert used.identity()["model"][option] == value
        assert used.digest() != config.digest()


def earlier_name(config) -> str:
    """As versions before names showed options made them."""
    return f"{config.model.name}-seed{config.seed}-{config.digest()[:10]}"


def test_a_run_is_found_by_its_identity_whatever_its_folder_shows(tmp_path):
    config, other = tiny_config(tmp_path), tiny_config(tmp_path, train__lr=2e-3)
    assert not config.is_there
    for name in (earlier_name(config), f"attention-depth9-seed0-{config.digest()[:6]}"):
        made = RunFolder(tmp_path / "tiny" / name)
        made.create(config)
        assert config.is_there
        assert config.folder() == replace(config, shown={"train.lr": 0.5}).folder() == made.path
        assert RunFolder(config.folder()).config() == config
        made.path.rename(tmp_path / "away")
        (tmp_path / "away" / "config.json").unlink()
        (tmp_path / "away" / "checkpoints").rmdir()
        (tmp_path / "away").rmdir()
    # A folder of another run, whose hash begins with the same digits, is none of it.
    RunFolder(tmp_path / "tiny" / f"attention-lr2e-3-seed0-{config.digest()[:6]}").create(other)
    assert not config.is_there
    assert config.folder().name == f"attention-seed0-{config.digest()[:6]}"
    # Where nobody can read what is there, nothing is trained beside it in silence.
    damaged = tmp_path / "tiny" / earlier_name(config)
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    assert config.folder() == damaged


def test_what_a_name_shows_is_no_part_of_a_run(tmp_path):
    config = tiny_config(tmp_path)
    shown = replace(config, shown={"train.lr": 1e-3, "model.mixers.mamba2.d_state": 8, "task.pairs": 2})
    assert shown == config
    assert shown.digest() == config.digest()
    assert to_dict(shown) == to_dict(config)
    assert shown.folder().name == f"attention-lr1e-3-pairs2-seed0-{config.digest()[:6]}"
    long = replace(config, shown={f"train.option{number}": "x" * 99 for number in range(9)})
    assert len(long.folder().name) <= 60
    assert not config.may_name("attention-seed0")
    assert not config.may_name(f"attention-seed1-{config.digest()[:6]}")
    assert not config.may_name(f"attention2-seed0-{config.digest()[:6]}")
    assert config.may_name(earlier_name(config))


@pytest.mark.parametrize("name", ["", "..", "a/../b", "a b", "/a", 3, ["a"]])
def test_a_name_that_is_no_folders_is_refused(name):
    with pytest.raises(ConfigError, match="name must"):
        placed({"name": name, "experiment": "mqar"}, "mqar")


def test_resolving_twice_is_resolving_once(tmp_path):
    config = tiny_config(tmp_path, model__mixers={"attention": {"num_heads": 2}, "mamba2": {}})
    assert resolve(config) == config


def test_every_option_of_a_language_model_but_its_vocabulary_can_be_configured(tmp_path):
    """With the same defaults: a run and the library mean the same by saying nothing."""
    config = tiny_config(tmp_path)
    options = {option.name for option in fields(LMConfig)} - {"vocab_size"}
    assert to_dict(config)["model"].keys() == options | {"name"}
    given = {"d_model": 32, "pattern": "attention", "depth": 1, "channel": "none"}
    assert config.model.options == LMConfig(vocab_size=16, **given)


def test_the_vocabulary_is_the_tasks(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.vocab_size: unknown key"):
        tiny_config(tmp_path, model__vocab_size=17)


@pytest.mark.parametrize(("text", "told"), [("1 / 0", "ZeroDivisionError"), ("raise SystemExit(3)", "SystemExit: 3")])
def test_a_module_of_imports_that_raises_is_named(text, told, tmp_path, monkeypatch):
    (tmp_path / "parts_that_raise.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"imports: importing 'parts_that_raise' raises {told}"):
        tiny_config(tmp_path, imports=["parts_that_raise"])
