from __future__ import annotations

import pytest
import torch

from experiments.config.build import build_model
from experiments.training.lr_scheduler import learning_rate
from experiments.training.optimizers import OPTIMIZERS, Optimizers
from tests.support.runs import tiny_config, train_here


def made(tmp_path, pattern="mamba2, attention", **changes):
    whole = tiny_config(tmp_path, model__pattern=pattern, model__depth=2, model__channel="moe", **changes)
    model = build_model(whole)
    return model, Optimizers(model, whole.train)


def step(model, optimizers, number=0, bad=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizers.step(learning_rate(optimizers.config, number), torch.tensor(bad))


def snapshot(model, optimizers):
    tensors = {**model.state_dict(), **optimizers.tensors()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_in_one_group_and_decays_are_exempt(tmp_path, name):
    model, optimizers = made(tmp_path, train__optimizer=name)
    groups = [group for part in optimizers.parts for group in part.param_groups]
    placed = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, placed)) == sorted(map(id, model.parameters()))
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or any(word in parameter_name for word in ("A_log", "dt_bias", "norm"))
        assert decay[parameter] == (0.0 if exempt else 0.1), parameter_name


def test_muon_has_the_linear_maps_of_the_layers_and_adamw_the_rest(tmp_path):
    model, optimizers = made(tmp_path, train__optimizer="muon")
    muon, adamw = optimizers.parts
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = {names[parameter] for group in muon.param_groups for parameter in group["params"]}
    assert isinstance(muon, torch.optim.Muon)
    assert "stack.layers.1.mixers.0.qkv_proj.linear.weight" in held
    assert not {"embedding.weight", "head.weight", "stack.layers.0.channel.w_in"} & held
    assert isinstance(adamw, torch.optim.AdamW)


def test_muon_turns_a_gradient_into_nearly_orthogonal_updates(tmp_path):
    model, optimizers = made(tmp_path, train__optimizer="muon", train__lr=1.0, train__weight_decay=0.0)
    weight = model.get_parameter("stack.layers.1.mixers.0.qkv_proj.linear.weight")
    before = weight.detach().clone()
    step(model, optimizers)
    singular = torch.linalg.svdvals(before - weight)
    assert 0.5 < singular.min() / singular.max() < 1  # of the gradient itself it is 0.08


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_nothing_and_a_sound_one_everything(tmp_path, name):
    model, optimizers = made(tmp_path, train__optimizer=name, train__bad_step="skip")
    step(model, optimizers)
    before = snapshot(model, optimizers)
    step(model, optimizers, number=1, bad=1.0, seed=1)
    after = snapshot(model, optimizers)
    assert all(torch.equal(before[key], after[key]) for key in before)
    step(model, optimizers, number=1, seed=1)
    moved = snapshot(model, optimizers)
    assert not any(torch.equal(before[key], moved[key]) for key in optimizers.tensors())


def test_making_the_state_ahead_changes_nothing(tmp_path):
    model, optimizers = made(tmp_path)
    torch.manual_seed(0)
    plain = build_model(tiny_config(tmp_path, model__pattern="mamba2, attention", model__depth=2, model__channel="moe"))
    model.load_state_dict(plain.state_dict())
    lazy = torch.optim.AdamW(
        [{**group, "params": [dict(plain.named_parameters())[optimizers._names[p]] for p in group["params"]]}
         for group in optimizers.parts[0].param_groups], fused=True
    )  # fmt: skip
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        optimizers.step(learning_rate(optimizers.config, number), torch.zeros(()))
        for group in lazy.param_groups:
            group["lr"] = optimizers.lr
        lazy.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_what_never_gets_a_gradient_has_its_state_too(tmp_path):
    """Such as what compresses blocks that are longer than the sequence: a checkpoint has a place for it."""
    model, optimizers = made(tmp_path)
    before = optimizers.tensors().keys()
    model.get_parameter("embedding.weight").grad = None
    optimizers.step(1e-3, torch.zeros(()))
    assert optimizers.tensors().keys() == before
    assert {name.rpartition("/")[0] for name in before} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("changes", [{"train__optimizer": "muon"}, {"train__schedule": "wsd"}])
def test_a_run_trains_with_it(tmp_path, changes):
    code, folder = train_here(tiny_config(tmp_path, train__steps=60, train__eval_every=30, **changes))
    assert code == 0
    first, second = folder.evaluations()
    assert second["validation_loss"] < first["validation_loss"]
