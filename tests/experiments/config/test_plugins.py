"""Plug-ins: modules and classes of a user's own, and what they are registered as."""

from __future__ import annotations

import sys
from dataclasses import make_dataclass

import pytest

import experiments
import seqarch
from experiments.config import plugins
from experiments.config.schema import run_config, to_dict
from experiments.tasks import TASKS, Task
from experiments.tasks.generated import GeneratedConfig, GeneratedTask
from experiments.tasks.parity import Parity
from experiments.trackers import TRACKERS, Tracker
from experiments.util.errors import ConfigError
from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.layers.attention.attention import Attention
from seqarch.layers.channel.mlp import Mlp
from tests.support.plugins import plugin_folder
from tests.support.runs import tiny_config

__all__ = ["plugin_folder"]


def derived(base: type, name: str = "Own", **content) -> type:
    return type(name, (base,), {"__module__": "my_package", **content})


ENOUGH = {"name": "own", "title": "t", "reading": "r"}


@pytest.mark.parametrize(
    ("register", "name", "given", "words"),
    [
        (experiments.register_task, "own", Parity(Parity.Config()), ["'own'", "experiments.tasks.task.Task", "Parity"]),
        (experiments.register_task, "own", Tracker, ["expected a subclass of experiments.tasks.task.Task", "Tracker"]),
        (experiments.register_task, "own", Task, ["expected a subclass"]),
        (experiments.register_task, "o n", Parity, ["'o n'", "letters, digits and _"]),
        (experiments.register_task, "own", Parity, ["parity.Parity has the name 'parity'"]),
        (experiments.register_task, "own", derived(Task, Config=make_dataclass("C", [])),
         ["my_package.Own has to define __init__, train_batch, evaluation, score, item_scores, chance, manifest, name",
          ", title, reading, metric"]),
        (experiments.register_task, "own", derived(Parity, Config=3), ["my_package.Own.Config has to be a dataclass"]),
        (experiments.register_task, "own", derived(Parity, **ENOUGH, test_options=("lengths",)),
         ["test_options name 'lengths'"]),
        (experiments.register_task, "own", derived(GeneratedTask, **ENOUGH, Config=GeneratedConfig),
         ["has to define generate, guess"]),
        (experiments.register_task, "parity", derived(Parity), ["'parity'", "tasks.parity.Parity", "my_package.Own"]),
        (experiments.register_tracker, "own", Parity, ["expected a subclass of experiments.trackers.tracker.Tracker"]),
        (experiments.register_tracker, "9", derived(Tracker), ["'9'", "which a letter begins"]),
        (experiments.register_tracker, "own", derived(Tracker, Config=dict), ["Own.Config has to be a dataclass"]),
        (experiments.register_tracker, "own", derived(Tracker, __init__=lambda self: None),
         ["(options, folder, config)"]),
        (experiments.register_tracker, "wandb", derived(Tracker), ["trackers.wandb.WandbTracker", "my_package.Own"]),
        (seqarch.register_mixer, "attention", derived(Attention), ["attention.Attention", "my_package.Own"]),
        (seqarch.register_channel_mixer, "mlp", derived(Mlp), ["channel.mlp.Mlp", "my_package.Own"]),
    ],
)  # fmt: skip
def test_what_cannot_be_registered_is_refused_and_changes_nothing(register, name, given, words):
    before = [dict(registry) for registry in (TASKS, TRACKERS, MIXERS, CHANNEL_MIXERS)]
    with pytest.raises((TypeError, ValueError)) as caught:
        register(name, given)
    for part in words:
        assert part in str(caught.value)
    assert [dict(registry) for registry in (TASKS, TRACKERS, MIXERS, CHANNEL_MIXERS)] == before


def test_every_task_and_tracker_of_the_house_passes_the_checks():
    """And may be registered again, which changes nothing."""
    before = dict(TASKS), dict(TRACKERS)
    for name, task in TASKS.items():
        experiments.register_task(name, task)
    for name, tracker in TRACKERS.items():
        if tracker is not Tracker:
            experiments.register_tracker(name, tracker)
    assert before == (TASKS, TRACKERS)


PARTS = """
import experiments, seqarch
from experiments.tasks.parity import Parity
from experiments.trackers import Tracker
from seqarch.layers.attention.attention import Attention
from seqarch.layers.channel.mlp import Mlp

class Mine(Attention): pass
class Wide(Mlp): pass
class Odd(Parity): name = "odd"
class Silent(Tracker): pass
"""
REGISTER = """
seqarch.register_mixer("mine", Mine)
seqarch.register_channel_mixer("wide", Wide)
experiments.register_task("odd", Odd)
experiments.register_tracker("silent", Silent)
"""


def own(tmp_path, names: dict[str, str], **changes):
    plain = to_dict(tiny_config(tmp_path))
    model = {**plain["model"], "name": "mine", "pattern": f"{names['mixer']}/{names['channel']}"}
    model |= {"mixers": {names["mixer"]: {"num_heads": 2}}}
    task, tracker = {"name": names["task"], "length": 8}, {"name": names["tracker"]}
    return run_config({**plain, "model": model, "task": task, "tracker": tracker, **changes})


@pytest.mark.parametrize("by_path", [False, True])
def test_everything_of_a_plugin_can_be_named(tmp_path, plugin_folder, by_path):
    """By the names that it registers, or by the paths of its classes, which need no plug-in and no registration."""
    (plugin_folder / "my_parts.py").write_text(PARTS + ("" if by_path else REGISTER))
    names = {"mixer": "mine", "channel": "wide", "task": "odd", "tracker": "silent"}
    paths = {"mixer": "my_parts:Mine", "channel": "my_parts:Wide", "task": "my_parts:Odd", "tracker": "my_parts:Silent"}
    config = own(tmp_path, paths) if by_path else own(tmp_path, names, plugins=["my_parts"])
    assert TASKS[config.task.name].__name__ == "Odd"
    assert run_config(to_dict(config)) == config
    assert plugins.plugin_packages() == {"my_parts": None}
    assert plugins.plugin_folders() == [str(plugin_folder)]


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("task", "my_parts:Nobody", ["task.name: my_parts:Nobody", "my_parts has no class Nobody"]),
        ("task", "no_parts:Odd", ["task.name: no_parts:Odd: cannot import 'no_parts'", "PYTHONPATH"]),
        ("task", "my_parts:Mine", ["task.name", "a subclass of experiments.tasks.task.Task", "Mine"]),
        ("tracker", "my_parts:Odd", ["tracker.name", "a subclass of experiments.trackers.tracker.Tracker"]),
        ("mixer", "my_parts:Wide", ["model.mixers", "a subclass of seqarch.layers.mixer.Mixer", "Wide"]),
        ("channel", "my_parts:Mine", ["model.channels", "a subclass of seqarch.layers.mixer.ChannelMixer"]),
    ],
)
def test_a_path_that_leads_nowhere_is_named_with_its_key(tmp_path, plugin_folder, key, name, words):
    (plugin_folder / "my_parts.py").write_text(PARTS)
    good = {"mixer": "my_parts:Mine", "channel": "my_parts:Wide", "task": "my_parts:Odd", "tracker": "none"}
    with pytest.raises(ConfigError) as caught:
        own(tmp_path, {**good, key: name})
    for part in words:
        assert part in str(caught.value)


def test_a_name_registered_twice_names_the_plugin_and_both_classes(tmp_path, plugin_folder):
    (plugin_folder / "my_parts.py").write_text(PARTS + "class Mine2(Mine): pass\n" + REGISTER
                                               + "seqarch.register_mixer('mine', Mine2)\n")  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"plugins: importing 'my_parts' raises ValueError.*'mine'.*Mine already.*Mine2"
    ):
        tiny_config(tmp_path, plugins=["my_parts"])


def install(folder, module: str) -> None:
    """An installed package that offers a module as a plug-in, as pip leaves it."""
    info = folder / "own_parts-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-parts\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[seqarch.plugins]\nmine = {module}\n")


def test_plugins_of_installed_packages_need_not_be_named(tmp_path, plugin_folder):
    (plugin_folder / "my_parts.py").write_text(PARTS + REGISTER)
    install(plugin_folder, "my_parts")
    own(tmp_path, {"mixer": "mine", "channel": "wide", "task": "odd", "tracker": "silent"})
    assert plugins.plugin_packages() == {"my_parts": "1.2"}


def test_an_installed_plugin_that_cannot_be_imported_is_named_with_its_package(tmp_path, plugin_folder):
    install(plugin_folder, "gone_parts")
    with pytest.raises(
        ConfigError, match="the plug-in 'mine' of the installed package own-parts: cannot import 'gone_"
    ):
        tiny_config(tmp_path)
    assert "gone_parts" not in sys.modules


def test_the_former_name_of_the_key_is_read(tmp_path, plugin_folder):
    (plugin_folder / "my_parts.py").write_text(PARTS)
    config = tiny_config(tmp_path, imports=["my_parts"], plugins=["my_parts"])
    assert (config.plugins, "imports" in to_dict(config)) == (["my_parts"], False)


def test_options_in_a_pattern_name_no_modules():
    """A mapping there has colons as a path has; only the layers are imported."""
    before = dict(MIXERS)
    plugins.register_model_paths({"pattern": "attention(rope_scaling={rope_type:yarn, factor:4}) mamba2(x='a.b:C')"})
    assert before == MIXERS
    with pytest.raises(ConfigError, match="cannot import 'no_such_module'"):
        plugins.register_model_paths({"pattern": "attention(x={a:b}) no_such_module:Own(x=1)"})
