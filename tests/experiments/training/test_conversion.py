"""Runs that are made of a teacher: converted starts, objectives that need one, and what refuses them."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
import torch

from experiments.sensitivity import main as sensitivity
from experiments.training.loop import Run
from experiments.util.errors import ConfigError
from experiments.util.files import read_json
from seqarch import load
from seqarch.convert import carry_over
from seqarch.models import tile_pattern
from tests.support.runs import RunFolder, last, same, tensors, tiny_config, train_here, train_in_two_attempts

DEPTH = {"model__depth": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = tiny_config(tmp_path_factory.mktemp("teacher"), model__mixers={"attention": {"num_heads": 2}}, **DEPTH)
    return train_here(config)[1]


def student(teacher: RunFolder, runs: Any, pattern: str = "gated_delta_net attention", **changes: Any):
    """A run that starts from the teacher's weights."""
    start = {"model__pattern": pattern, "train__start_from": str(teacher.path), "train__convert": "whole", **DEPTH}
    return tiny_config(runs, **{**start, **changes})


def learns(teacher: RunFolder, objective: str, **more: Any) -> dict[str, Any]:
    return {"train__objective": objective, "train__teacher": str(teacher.path), **more}


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}


def test_a_start_is_converted(tmp_path, teacher):
    """The sizes of heads are the teacher's, and the weights those of the library's own conversion."""
    config = student(teacher, tmp_path)
    layers = tile_pattern(config.model.options.pattern, 2)
    assert layers[0].options[0] == {"num_heads": 2, "key_width": 16, "value_width": 16}
    assert layers[1].mixers == ("attention",)
    assert config.model.options.mixers == {"attention": {"num_heads": 2}}
    run = Run(config, RunFolder(config.folder()))
    run.start()
    source = load(teacher.path)
    torch.manual_seed(config.seed)
    made = type(source)(config.model.options)
    carry_over(source, made)
    assert same(weights(run), {f"model.{name}": tensor for name, tensor in made.state_dict().items()})
    assert config.folder() == student(teacher, tmp_path).folder()
    code, folder = train_here(config)
    assert code == 0
    assert folder.record()["started_from"]["run"] == teacher.path.name


@pytest.mark.parametrize("objective", ["mixer_outputs", "mixer_matrices"])
def test_mixers_alone_learn_from_a_teacher(tmp_path, teacher, objective):
    config = student(teacher, tmp_path, **learns(teacher, objective), train__lr=1e-2, train__steps=30)
    run = Run(config, RunFolder(config.folder()))
    run.start()
    before = {name: tensor.clone() for name, tensor in weights(run).items()}
    code, folder = train_here(config)
    assert code == 0
    after = tensors(last(folder), "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model.stack.layers.0.mixers.") for name in changed)
    losses = [line["loss"] for line in folder.metrics() if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    tested = teacher.record()["results"]["checkpoint"]
    sha256 = read_json(teacher.checkpoints / tested / "manifest.json")["sha256"]
    step = int(tested.removeprefix("step-"))
    assert folder.record()["teacher"] == {"run": teacher.path.name, "step": step, "sha256": sha256}


def test_logits_learn_from_a_teacher(tmp_path, teacher):
    """At a weight of 1 of the targets it is plain training, to the bit; at 0 it is not."""
    first = {**learns(teacher, "logits"), "train__temperature": 2.0}
    code, soft = train_here(student(teacher, tmp_path / "soft", **first))
    assert code == 0
    plain = train_here(student(teacher, tmp_path / "plain"))[1]
    hard = train_here(student(teacher, tmp_path / "hard", **first, train__target_weight=1.0))[1]
    ours, theirs = (tensors(last(folder), "model") for folder in (hard, plain))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    assert not same(tensors(last(soft), "model"), theirs)


def test_micro_batches_give_the_same_gradients(tmp_path, teacher):
    for objective in ("mixer_outputs", "logits"):
        found = []
        for size in (0, 3):
            config = student(teacher, tmp_path / f"{size}", **learns(teacher, objective), train__micro_batch=size)
            run = Run(config, RunFolder(config.folder()))
            run.start()
            batch = run.data.source(0, 0).batch(0, 0, 0, 8)
            run.engine.gradients(run.model, batch, size)
            found.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
        tolerance = {"mixer_outputs": 0.1, "logits": 1e-5}[objective]  # outputs are relative to their own micro-batch
        assert (found[0] - found[1]).norm() < tolerance * found[0].norm()


def test_it_resumes_to_the_bit_and_without_its_start(tmp_path, monkeypatch, teacher):
    copied = tmp_path / "copied" / teacher.path.name
    shutil.copytree(teacher.path, copied)
    start = {"train__start_from": str(copied), **learns(teacher, "mixer_outputs")}
    whole = train_here(student(teacher, tmp_path / "whole", **start))[1]
    torn_config = student(teacher, tmp_path / "torn", **start)
    code, torn = train_in_two_attempts(torn_config, monkeypatch, lambda: shutil.rmtree(copied))
    assert code == 0
    assert same(tensors(last(whole)), tensors(last(torn)))


def test_sensitivity_of_a_run(tmp_path, teacher, capsys):
    run = train_here(student(teacher, tmp_path, "gated_delta_net", **learns(teacher, "mixer_outputs")))[1]
    capsys.readouterr()
    assert sensitivity([str(run.path), "--keep", "1"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"layer +mixer +accuracy +change", shown[0])
    assert sorted(line.split()[0] for line in shown[1:3]) == ["0", "1"]
    dearest = shown[1].split()[0]
    assert shown[3] == f"to keep 1: keep_layers=[{dearest}]"
    assert sensitivity([str(run.path), "--keep", "3"]) == 1
    assert "--keep is 3, expected 0 to 2" in capsys.readouterr().err
    assert sensitivity([str(teacher.path)]) == 1
    assert "the run has no teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__d_model": 64}, "train.start_from: .*d_model is 32 in the teacher and 64 here"),
        ({"model__depth": 4}, "train.start_from: .*depth is 2 in the teacher and 4 here"),
        ({"task__vocab_size": 32}, "train.start_from: .*vocab_size is 16 in the teacher and 32 here"),
        ({"model__pattern": "lstm attention"}, "train.start_from: .*layer 0: lstm cannot take q"),
        ({"train__start_from": None}, "train.convert=whole: convert is of what start_from names"),
        ({"train__objective": "logits"}, "train.objective=logits needs train.teacher"),
        ({"train__temperature": 2.0}, "temperature is of objective: logits, got targets"),
        ({"machine__processes": 2}, "train.convert: such a run has one process, and machine.processes is 2"),
        ({"model__input_factors": {"gated_delta_net": 2.0}}, "train.start_from: .*input_factors is .*2.0.*: {}"),
    ],
)
def test_a_start_that_does_not_fit(tmp_path, teacher, changes, message):
    with pytest.raises(ConfigError, match=message):
        student(teacher, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task__vocab_size": 32}, "train.teacher: .*the teacher has a vocabulary of 16, expected 32"),
        ({"train__objective": "mixer_outputs", "model__d_model": 64}, "train.teacher: .*d_model is 32"),
        ({"train__objective": "mixer_outputs"}, "train.teacher: .*the same mixers in every layer"),
        ({"train__objective": "targets"}, "a teacher is for objective: mixer_outputs, mixer_matrices, logits"),
        ({"train__bptt": 8}, "objective: logits is of whole sequences from their start: leave bptt out"),
        ({"train__temperature": 0.0}, "temperature must be a positive number"),
        ({"machine__processes": 2}, "train.teacher: such a run has one process, and machine.processes is 2"),
        ({"train__objective": "mixer_outputs", "train__compile": True}, "without compile: leave it out"),
        ({"train__target_weight": 1.5}, "target_weight must be at most 1"),
        ({"train__teacher_sha256": "0123"}, "train.teacher: .*asks for 0123"),
    ],
)
def test_a_teacher_that_does_not_fit(tmp_path, teacher, changes, message):
    heads = {"model__mixers": {"attention": {"num_heads": 2}}}
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **{**DEPTH, **heads, **learns(teacher, "logits"), **changes})
