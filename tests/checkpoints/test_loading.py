"""``seqarch.load``: the trained model of a run's folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

import seqarch
from experiments.runs.folder import RunFolder
from experiments.tasks.needle import Needle, NeedleConfig
from seqarch.checkpoints.errors import CheckpointError
from seqarch.checkpoints.tokenizers import ByteTokenizer
from seqarch.layers import MIXERS, Retention
from tests.support.runs import tensors, tiny_config, train_here

OWN = """
from seqarch.layers import Retention, register_mixer

class {name}(Retention):
    pass

register_mixer("{key}", {name})
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """A finished run, whose last checkpoint is not its best: the rate is so high that it gets worse."""
    runs = tmp_path_factory.mktemp("runs")
    config = tiny_config(runs, train__lr=0.3, train__warmup=0, train__keep_last=5, model__pattern="attention/moe")
    code, folder = train_here(config)
    assert code == 0
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run.path, tmp_path / "copy"))


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def holds(model: seqarch.LanguageModel, checkpoint: Path) -> bool:
    kept, own = tensors(checkpoint, "model."), model.state_dict()
    assert kept.keys() == {f"model.{name}" for name in own}
    return all(torch.equal(own[name], kept[f"model.{name}"]) for name in own)


def test_the_model_of_a_finished_run_is_the_one_that_was_tested(run):
    before = torch.random.get_rng_state()
    model = seqarch.load(run.path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    assert holds(model, run.checkpoints / run.record()["results"]["checkpoint"])
    assert model.config == run.config().model.options
    assert model.tokenizer is None
    tokens = torch.randint(16, (2, 16))
    assert model(tokens)[0].shape == (2, 16, 16)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_another_step_and_a_run_that_was_stopped(run, copy):
    for step in (5, 10):
        assert holds(seqarch.load(str(copy), step=step, device="cpu"), run.checkpoints / f"step-{step:06d}")
    edit(copy / "run.json", lambda record: record.update(status="preempted", results={"checkpoint": "step-000005"}))
    assert holds(seqarch.load(copy), run.checkpoints / "step-000010")
    (copy / "run.json").unlink()
    assert holds(seqarch.load(copy), run.checkpoints / "step-000010")


def _tests_gone(copy: Path) -> None:
    edit(copy / "run.json", lambda record: record["results"].update(checkpoint="step-000007"))


def _damaged(copy: Path) -> None:
    for file in copy.glob("checkpoints/*/__0_0.distcp"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")


def _model(**changes):
    return lambda copy: edit(copy / "config.json", lambda config: config["model"].update(changes))


WRONG = [
    (shutil.rmtree, "is no run's folder: there is no such folder"),
    (lambda copy: (copy / "config.json").unlink(), "is no run's folder: it has no config.json"),
    (lambda copy: (copy / "config.json").write_text("{"), "cannot read .*config.json"),
    (lambda copy: edit(copy / "config.json", lambda config: config.update(format=1)), "of format 1, .* reads 2"),
    (lambda copy: shutil.rmtree(copy / "checkpoints"), "has no checkpoint yet: nothing lies in .*checkpoints"),
    (_tests_gone, "has no step-000007, the checkpoint that its results are of: expected step to be one of 5, 10"),
    (_damaged, "checkpoint .* is damaged: __0_0.distcp is not what was written"),
    (_model(depth=2), r"does not fit the model of .*config.json: Missing key\(s\) in state_dict: .*layers.1"),
    (_model(d_model=64), "does not fit the model of .*size mismatch for embedding.weight"),
    (_model(pattern="atention"), "cannot build the model of .*: unknown mixer 'atention'.*Did you mean 'attention'"),
    (_model(widht=3), "cannot build the model of .*unexpected keyword argument 'widht'"),
    (
        lambda copy: edit(copy / "config.json", lambda config: config.pop("model")),
        "cannot build the model of .*'model'",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[message[:24] for _, message in WRONG])
def test_what_cannot_be_loaded_is_one_error(copy, spoil, message):
    spoil(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        seqarch.load(copy)
    assert "\n" not in str(caught.value)


def test_a_step_that_is_not_there(run):
    with pytest.raises(CheckpointError, match="has no step-000007, one of that step: expected step to be one of 5, 10"):
        seqarch.load(run.path, step=7)


def test_mixers_of_ones_own_come_by_the_runs_plugins_or_by_their_paths(tmp_path, monkeypatch):
    """A module that cannot be imported matters only where what it registers is missing."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_mixers.py").write_text(OWN.format(name="Leaky", key="leaky_here"))
    pattern = "leaky_here own_mixers:Leaky"
    changes = {"model__pattern": pattern, "model__depth": 2, "plugins": ["own_mixers"], "train__steps": 1}
    code, folder = train_here(tiny_config(tmp_path / "runs", **changes))
    assert code == 0
    edit(folder.config_file, lambda config: config["plugins"].append("not_there"))
    model = seqarch.load(folder.path)  # registered by this process, which trained it
    assert type(model.stack.layers[1].mixers[0]).__name__ == "Leaky"
    del MIXERS["leaky_here"], sys.modules["own_mixers"]
    assert issubclass(type(seqarch.load(folder.path).stack.layers[0].mixers[0]), Retention)
    del MIXERS["leaky_here"], sys.modules["own_mixers"]
    (tmp_path / "own_mixers.py").unlink()
    with pytest.raises(
        CheckpointError, match=r"unknown mixer 'leaky_here'.*cannot import the plug-in own_mixers: No module named"
    ):
        seqarch.load(folder.path)


def test_a_model_of_bytes_has_their_tokenizer(tmp_path):
    task = {"name": "needle", "length": 256, "validation_examples": 4, "test_examples": 4}
    code, folder = train_here(tiny_config(tmp_path, task=task, train__steps=1))
    assert code == 0
    model = seqarch.load(folder.path)
    assert isinstance(model.tokenizer, ByteTokenizer)
    assert model.tokenizer.vocab_size == model.config.vocab_size == 256
    text = Needle(NeedleConfig(length=256)).train_batch(0, 0, 1).tokens[0]
    read = model.tokenizer.decode(torch.from_numpy(text))
    assert model.tokenizer.encode(read) == text.tolist()
    (continued,) = model.generate([model.tokenizer.encode("The key")], max_new_tokens=3)
    assert isinstance(model.tokenizer.decode(continued), str)


def test_bytes_and_the_start_of_a_text():
    plain, with_start = ByteTokenizer(256), ByteTokenizer(257)
    assert plain.encode("é") == with_start.encode("é") == [0xC3, 0xA9]
    assert (plain.start, with_start.start) == (None, 256)
    assert with_start.decode([256, 0xC3, 0xA9, 0x41]) == "éA"
    assert plain.decode([0xC3]) == "�"


def test_the_tokenizer_of_a_file(copy):
    words = {"a": 0, "b": 1, "?": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(copy / "tokenizer.json"))
    tokenizer = seqarch.load(copy).tokenizer
    assert tokenizer.encode("b a c") == [1, 0, 2]
    assert tokenizer.decode(torch.tensor([1, 0])) == "b a"
    assert tokenizer.vocab_size == 3
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json"):
        seqarch.load(copy)
