from __future__ import annotations

import pytest

from experiments.runs.folder import RunFolder
from experiments.util.errors import ConfigError, RunnerError, StorageError
from tests.support.runs import tiny_config


def test_a_folder_with_the_same_configuration_is_welcome(tmp_path):
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.check(config)
    folder.create(config)
    folder.check(tiny_config(tmp_path, tracker__name="wandb"))
    assert folder.config() == config


def test_a_folder_with_another_configuration_is_left_untouched(tmp_path):
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    before = folder.config_file.read_bytes()
    with pytest.raises(ConfigError, match=r"another configuration: train\.lr is 0\.001 there, 0\.5 wanted"):
        folder.check(tiny_config(tmp_path, train__lr=0.5))
    assert folder.config_file.read_bytes() == before


def test_somebody_elses_folder_is_left_untouched(tmp_path):
    config = tiny_config(tmp_path)
    config.folder().mkdir(parents=True)
    (config.folder() / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty and has no config\.json"):
        RunFolder(config.folder()).check(config)


@pytest.mark.parametrize("left", [["checkpoints"], [".config.json.12.tmp"], ["checkpoints", ".config.json.12.tmp"]])
def test_a_folder_half_made_is_made_whole(tmp_path, left):
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.path.mkdir(parents=True)
    for name in left:
        (folder.path / name).write_text("{") if name.endswith(".tmp") else (folder.path / name).mkdir()
    folder.check(config)
    folder.create(config)
    assert folder.config() == config
    assert folder.checkpoints.is_dir()


def test_what_makes_no_other_run_of_it_is_as_last_asked_for(tmp_path):
    before, after = (tiny_config(tmp_path, train__keep_last=keep, machine__price_per_hour=keep) for keep in (2, 5))
    folder = RunFolder(before.folder())
    folder.create(before)
    folder.check(after)
    folder.create(after)
    assert folder.config() == after


def test_checkpoints_without_a_configuration_are_left_untouched(tmp_path):
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.checkpoints.mkdir(parents=True)
    (folder.checkpoints / "mine").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"not empty and has no config\.json"):
        folder.check(config)


def test_a_wrong_key_in_a_stored_config_is_reported_with_its_file(tmp_path):
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    folder.config_file.write_text(folder.config_file.read_text().replace('"lr"', '"lrr"'))
    for read in (folder.config, lambda: folder.check(config)):
        with pytest.raises(ConfigError, match=r"config\.json is damaged or of another version: train\.lrr: unknown"):
            read()


def test_a_file_where_the_folder_should_be(tmp_path):
    config = tiny_config(tmp_path)
    config.folder().parent.mkdir(parents=True)
    config.folder().write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(config.folder()).check(config)
    with pytest.raises(StorageError, match=config.folder().name):
        RunFolder(config.folder()).create(config)


def test_a_damaged_config_is_named(tmp_path):
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    folder.config_file.write_text("{")
    with pytest.raises(RunnerError, match=r"cannot read .*config\.json"):
        folder.check(config)


def test_metrics_survive_a_line_cut_short(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics(step=1, loss=2.0)
    folder.append_metrics(step=2, loss=1.0)
    with open(folder.metrics_file, "a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in folder.metrics()] == [1, 2]
    folder.keep_metrics(lambda line: line["step"] < 2)
    assert folder.metrics_file.read_text() == '{"step": 1, "loss": 2.0}\n'
