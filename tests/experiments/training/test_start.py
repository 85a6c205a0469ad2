"""Runs that start from the weights of another run's checkpoint."""

from __future__ import annotations

import re
import shutil

import pytest

from experiments.config.schema import run_config, to_dict
from experiments.runs.folder import RunFolder
from experiments.sweeps.execute import resolve_composed
from experiments.training.loop import Run
from experiments.util.errors import ConfigError
from experiments.util.files import read_json
from tests.support.runs import last, same, tensors, tiny_config, train_here, train_in_two_attempts


@pytest.fixture
def first(tmp_path):
    return train_here(tiny_config(tmp_path / "first"))[1]


def weights(run: Run) -> dict:
    return {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}


def test_it_begins_with_the_weights_and_nothing_else(tmp_path, first):
    """Of a run, those that its results are of; the record says which."""
    tested = first.record()["results"]["checkpoint"]
    config = tiny_config(tmp_path, train__start_from=str(first.path), train__lr=2e-3)
    run = Run(config, RunFolder(config.folder()))
    state = run.start()
    assert (state.step, state.best) == (0, None)
    assert same(weights(run), tensors(first.checkpoints / tested, "model"))
    assert not any(tensor.any() for name, tensor in run.optimizers.tensors().items() if "exp_avg" in name)

    code, folder = train_here(config)
    sha256 = read_json(first.checkpoints / tested / "manifest.json")["sha256"]
    assert code == 0
    assert folder.record()["started_from"] == {
        "run": first.path.name,
        "step": int(tested.removeprefix("step-")),
        "sha256": sha256,
    }
    assert not same(tensors(last(folder), "model"), tensors(last(first), "model"))


def test_a_later_attempt_resumes_from_its_own_checkpoints(tmp_path, monkeypatch, first):
    """To the bit, and where what it started from is gone by then."""
    start = str(last(first))
    _, whole = train_here(tiny_config(tmp_path / "whole", train__start_from=start))
    torn_config = tiny_config(tmp_path / "torn", train__start_from=start)
    code, torn = train_in_two_attempts(torn_config, monkeypatch, lambda: shutil.rmtree(first.path))
    assert code == 0
    assert same(tensors(last(whole)), tensors(last(torn)))
    assert torn.record()["results"] == whole.record()["results"]


def test_what_it_starts_from_counts_by_its_content_and_not_by_its_place(tmp_path, first):
    other = tmp_path / "moved" / first.path.name
    shutil.copytree(first.path, other)
    configs = [tiny_config(tmp_path, train__start_from=str(path)) for path in (first.path, other, last(first))]
    assert configs[0].folder() == configs[1].folder()
    assert configs[0].folder() != tiny_config(tmp_path).folder()
    earlier = next(path for path in first.checkpoints.iterdir() if path.name == "step-000005")
    assert tiny_config(tmp_path, train__start_from=str(earlier)).folder() != configs[2].folder()
    RunFolder(configs[0].folder()).create(configs[0])
    RunFolder(configs[0].folder()).check(configs[1])
    assert run_config(to_dict(configs[0])) == configs[0]
    assert resolve_composed(to_dict(configs[0])) == configs[0]


def spoilt(first: RunFolder, how: str) -> tuple[str, str]:
    """A path that nothing can start from, and a part of the message."""
    path = last(first)
    match how:
        case "nothing":
            return str(first.path / "nowhere"), "nowhere: there is no such folder"
        case "no run":
            return str(first.path.parent), "is neither the folder of a run nor that of a checkpoint in one"
        case "no checkpoint":
            return str(first.checkpoints), "is neither the folder of a run nor that of a checkpoint in one"
        case "home":
            return "~/runs", "'~/runs' begins with a ~ that the shell did not replace"
        case "unfinished":
            first.update(status="preempted")
            return str(first.path), "is not finished; give one of the folders in"
        case "gone":
            shutil.rmtree(first.checkpoints / first.record()["results"]["checkpoint"])
            return str(first.path), "which its run was tested with, is gone"
        case "no data":
            (path / "__0_0.distcp").unlink()
            return str(path), f"checkpoint {path} is damaged: __0_0.distcp is missing"
        case "a byte":
            (path / "__0_0.distcp").write_bytes(b"x")
            return str(path), f"checkpoint {path} is damaged: __0_0.distcp is not what was written (1 bytes of"
        case _:
            (path / "manifest.json").unlink()
            return str(path), f"checkpoint {path} is damaged: manifest.json is missing or not what was written"


KINDS = ["nothing", "no run", "no checkpoint", "home", "unfinished", "gone", "no data", "a byte", "no manifest"]


@pytest.mark.parametrize("how", KINDS)
def test_what_cannot_be_started_from_is_named_before_anything_is_written(tmp_path, first, how):
    start, message = spoilt(first, how)
    with pytest.raises(ConfigError, match=f"train.start_from: .*{re.escape(message)}"):
        tiny_config(tmp_path / "second", train__start_from=start)
    assert not (tmp_path / "second").exists()


def test_a_model_that_does_not_fit_is_named(tmp_path, first):
    start = {"train__start_from": str(first.path)}
    with pytest.raises(ConfigError, match=r"of another model: embedding.weight is \[16, 32\] there, \[16, 64\] here"):
        tiny_config(tmp_path, model__d_model=64, **start)
    with pytest.raises(
        ConfigError, match=r"of another model: stack.layers.1.norm.weight is missing there, \[32\] here"
    ):
        tiny_config(tmp_path, model__depth=2, **start)
    with pytest.raises(ConfigError, match=r"has the hash [0-9a-f]{64}, and train.start_sha256 asks for 0123"):
        tiny_config(tmp_path, train__start_sha256="0123", **start)
    with pytest.raises(ConfigError, match=r"start_sha256 is of what start_from names, and that is not given"):
        tiny_config(tmp_path, train__start_sha256="0123")


def test_a_checkpoint_that_was_exchanged_meanwhile_is_refused(tmp_path, first):
    config = tiny_config(tmp_path, train__start_from=str(last(first)))
    again = train_here(tiny_config(tmp_path / "again", train__lr=2e-3))[1]
    shutil.rmtree(last(first))
    shutil.copytree(last(again), first.checkpoints / "step-000010")
    code, folder = train_here(config)
    assert code == 1
    assert "has the hash" in folder.record()["reason"]
    assert "and this run began with" in folder.record()["reason"]
