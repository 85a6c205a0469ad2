"""Runs in which adapters learn, or parameters that are named, and nothing else."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from experiments.config.schema import run_config, to_dict
from experiments.training.dry_run import plan
from experiments.training.loop import Run
from experiments.util.errors import ConfigError
from seqarch import LanguageModel, load, quantize
from tests.support.runs import RunFolder, last, same, tensors, tiny_config, train_here, train_in_two_attempts

SIZES = {"model__depth": 2, "model__channel": "swiglu", "model__mixers": {"attention": {"num_heads": 2}}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train_here(tiny_config(tmp_path_factory.mktemp("teacher"), **SIZES))[1]


def tuned(teacher: RunFolder, runs: Any, **changes: Any):
    """A run that changes the teacher's heads by adapters."""
    given = {"train__start_from": str(teacher.path), "train__lora": {"rank": 2, "targets": ["q", "k", "v", "o"]}}
    return tiny_config(runs, **{**SIZES, **given, "train__lr": 1e-2, **changes})


def started(teacher: RunFolder) -> dict[str, torch.Tensor]:
    return tensors(teacher.checkpoints / teacher.record()["results"]["checkpoint"], "model")


def test_adapters_alone_learn_and_the_folder_holds_a_plain_model(tmp_path, teacher):
    config = tuned(teacher, tmp_path)
    code, folder = train_here(config)
    assert code == 0
    before, after = started(teacher), tensors(last(folder), "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.stack.layers.{i}.mixers.0.{name}.weight" for i in (0, 1)
                       for name in ("qkv_proj.linear", "out_proj")}  # fmt: skip
    for name in changed:
        change = (after[name] - before[name]).double()
        assert all(1 <= torch.linalg.matrix_rank(part, rtol=1e-3) <= 2 for part in change.split(32))
    sizes = folder.record()["model"]
    assert sizes["trained_parameters"] == 2 * 4 * 2 * (32 + 32)
    of_teacher = teacher.record()["model"]
    assert sizes["parameters"] == of_teacher["parameters"] == of_teacher["trained_parameters"]
    assert "as where all weights learn" in folder.record()["cost"]["flops_formula"]
    losses = [line["loss"] for line in folder.metrics() if "loss" in line]
    assert losses[-1] < losses[0]

    model = load(folder.path)
    tested = tensors(folder.checkpoints / folder.record()["results"]["checkpoint"], "model")
    assert same({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, tested)
    model.save_pretrained(tmp_path / "saved")
    again = LanguageModel.from_pretrained(tmp_path / "saved")
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(again.generate(tokens, 4)[0], model.generate(tokens, 4)[0])
    assert quantize(again, "int8", group_size=32, keep="*.channel.*").num_parameters() == model.num_parameters()


def test_what_is_tested_is_what_is_saved(tmp_path, teacher):
    """The model that the results are of computes with the changes, the one in the folder has them merged."""
    config = tuned(teacher, tmp_path, train__eval_checkpoint="best")
    code, folder = train_here(config)
    assert code == 0
    run = Run(config, folder)
    run.resume()
    run.test()
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(run.model.eval()(tokens)[0], load(folder.path)(tokens)[0])


@pytest.mark.parametrize("convert", [None, "whole"])
def test_it_resumes_to_the_bit_and_without_its_start(tmp_path, monkeypatch, teacher, convert):
    copied = tmp_path / "copied" / teacher.path.name
    shutil.copytree(teacher.path, copied)
    changes = {"train__start_from": str(copied), "train__convert": convert, "train__trainable": ["norm", "*.channel"]}
    if convert:
        changes |= {"model__pattern": "gated_delta_net attention"}
    whole = train_here(tuned(teacher, tmp_path / "whole", **changes))[1]
    torn_config = tuned(teacher, tmp_path / "torn", **changes)
    code, torn = train_in_two_attempts(torn_config, monkeypatch, lambda: shutil.rmtree(copied))
    assert code == 0
    assert same(tensors(last(whole)), tensors(last(torn)))
    assert whole.record()["results"]["test"] == torn.record()["results"]["test"]


def test_adapters_are_put_on_what_was_converted(tmp_path, teacher):
    """Before the first step the model is the converted one."""
    given = {"model__pattern": "gated_delta_net attention", "train__convert": "whole"}
    with_adapters, without = (tuned(teacher, tmp_path, **given, **more) for more in ({}, {"train__lora": None}))
    found = []
    for config in (with_adapters, without):
        run = Run(config, RunFolder(config.folder()))
        run.start()
        found.append(run.weights.content()["model"])
    assert same(*found)


def test_mixers_learn_from_a_teacher_by_adapters_in_some_layers(tmp_path, teacher):
    given = {"model__pattern": "gated_delta_net", "train__convert": "whole", "train__objective": "mixer_outputs",
             "train__teacher": str(teacher.path)}  # fmt: skip
    named = {"train__lora": None, "train__trainable": ["stack.layers.1.mixers"]}
    code, folder = train_here(tuned(teacher, tmp_path, **given, **named))
    assert code == 0
    of_layers = {name: tensors(last(folder), f"model.stack.layers.{i}") for i, name in enumerate(("first", "second"))}
    config = tuned(teacher, tmp_path, **given, **named)
    run = Run(config, RunFolder(config.folder()))
    run.start()
    begun = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    assert same(of_layers["first"], {name: begun[name] for name in of_layers["first"]})
    assert not same(of_layers["second"], {name: begun[name] for name in of_layers["second"]})
    code, folder = train_here(tuned(teacher, tmp_path / "none", **given, train__lora={"targets": ["swiglu"]}))
    assert code == 1
    assert folder.record()["reason"].startswith("train.objective: mixer_outputs depends on nothing that learns")


def test_routers_that_do_not_learn_keep_their_biases(tmp_path):
    experts = {"model__channel": "moe", "model__channels": {"moe": {"num_experts": 4, "expert_bias": True}}}
    biases = []
    for place, named in (("all", None), ("norm", ["norm"]), ("router", ["*.router"])):
        folder = train_here(tiny_config(tmp_path / place, train__trainable=named, **experts))[1]
        (bias,) = (each for name, each in tensors(last(folder), "model").items() if name.endswith("expert_bias"))
        biases.append(bool(bias.any()))
    assert biases == [True, False, True]


def test_precision_checkpointing_and_micro_batches_go_with_it(tmp_path, teacher):
    given = {"train__activation_checkpointing": True, "train__micro_batch": 3}
    plain, parts = (train_here(tuned(teacher, tmp_path / name, **more))[1] for name, more in (("a", {}), ("b", given)))
    ours, theirs = (tensors(last(folder), "model") for folder in (plain, parts))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert train_here(tuned(teacher, tmp_path, train__precision="bfloat16", train__optimizer="muon"))[0] == 0


def test_a_dry_run_counts_what_learns(tmp_path, teacher):
    estimate = plan(tuned(teacher, tmp_path))
    assert estimate.trained == 1024
    assert estimate.gradient_bytes == 4 * 1024
    assert "1,024 learn" in str(estimate)
    whole = plan(tuned(teacher, tmp_path, train__lora=None))
    assert estimate.parameters == whole.parameters == whole.trained
    assert "learn" not in str(whole)


def test_a_configuration_comes_back_and_counts_where_it_is_given(tmp_path, teacher):
    config = tuned(teacher, tmp_path, train__trainable=["norm"])
    assert run_config(to_dict(config)) == config
    plain = to_dict(tuned(teacher, tmp_path, train__lora=None))["train"]
    assert not {"lora", "trainable"} & plain.keys()
    ranks = {tuned(teacher, tmp_path, train__lora={"rank": rank}).digest() for rank in (2, 4)}
    assert len({*ranks, config.digest()}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__lora": {"rank": 0}}, "train.lora: rank must be at least 1, got 0"),
        ({"train__lora": {"alpha": 0}}, "train.lora: alpha must be a positive number, got 0"),
        ({"train__lora": {"target": ["q"]}}, "train.lora.target: unknown key, .*Did you mean 'targets'"),
        (
            {"train__lora": {"targets": ["q_proj"]}},
            "train.lora: 'q_proj' matches nothing in the model; expected one of",
        ),
        ({"train__trainable": ["heads"]}, "train.trainable: 'heads' names no parameter; expected"),
        (
            {"train__trainable": ["stack"]},
            r"train.lora: stack.*out_proj.weight learns itself, and is to have an adapter",
        ),
        ({"train__lora": None, "train__trainable": ["heads"]}, "train.trainable: 'heads' names no parameter"),
        ({"train__lora": None, "train__trainable": []}, "trainable is empty, so that nothing would learn"),
        ({"train__start_from": None}, "train.lora changes what train.start_from names, .*: it is not given"),
        ({"machine__processes": 2}, "train.lora: such a run has one process, and machine.processes is 2"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, teacher, changes, message):
    with pytest.raises(ConfigError, match=message):
        tuned(teacher, tmp_path, **changes)
