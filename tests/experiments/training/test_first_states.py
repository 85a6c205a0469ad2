"""States that training sequences begin with though they follow nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from experiments.config.carrying import passes
from experiments.runs.folder import RunFolder
from experiments.training.first_states import FirstStates, moments
from experiments.training.loop import Run
from experiments.util.errors import ConfigError
from seqarch.layers import MIXERS, build_mixer
from tests.support.runs import last, tiny_config, train_here
from tests.support.streamed import streamed, write_texts
from tests.support.variants import VARIANTS


def prepared(runs, first_state: str, pattern: str = "mamba2", **others) -> Run:
    config = tiny_config(runs, model__pattern=pattern, train__first_state=first_state, **others)
    return Run(config, RunFolder(config.folder()))


def steps(run: Run, count: int) -> list[float]:
    """The losses of some batches, without updates."""
    assert run.carried is not None
    losses = []
    for number in range(count):
        run.carried.begin(number)
        batch = run.data.source(number, 0).batch(run.config.seed, number)
        losses.append(run.engine.gradients(run.model, batch, None, run.carried).item())
    return losses


@torch.no_grad()
def loss_from(run: Run, number: int, state: object) -> tuple[float, object]:
    batch = run.data.source(number, 0).batch(run.config.seed, number)
    logits, after = run.model(torch.from_numpy(batch.tokens), state)
    return F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten()).item(), after


def test_passed_states_are_those_that_the_step_before_ended_with(tmp_path):
    run = prepared(tmp_path, "passed")
    expected, state = [], None
    for number in range(3):
        loss, state = loss_from(run, number, state)
        expected.append(loss)
    np.testing.assert_allclose(steps(run, 3), expected, rtol=1e-5)
    assert expected[1] != pytest.approx(loss_from(run, 1, None)[0], rel=1e-4)


@pytest.mark.parametrize("first_state", ["passed", "noise", "fitted_noise"])
@pytest.mark.parametrize("name", [name for name in MIXERS if name in ("mamba", "mamba2", "gla", "rwkv7", "gru")])
def test_it_is_the_same_in_micro_batches_and_segments(tmp_path, name, first_state):
    kinds = ({}, {"train__micro_batch": 1}, {"train__bptt": 5})
    mixers = {"model__mixers": {name: VARIANTS.get(name, [{}])[-1]}}
    losses = [steps(prepared(tmp_path, first_state, name, **mixers, **others), 3) for others in kinds]
    for others in losses[1:]:
        np.testing.assert_allclose(others, losses[0], rtol=1e-5)
    assert len(set(losses[0])) == 3


def test_noise_is_drawn_anew_with_each_step_and_each_seed(tmp_path):
    run = prepared(tmp_path, "noise", train__first_state_std=0.25)
    found = []
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        states = FirstStates(run.model, 0, 64, "noise", 0.25, seed)
        states.begin(step)
        (((conv, leaf),),) = states.rows(slice(None))
        found.append(leaf)
        assert not conv.any()
        assert leaf.std().item() == pytest.approx(0.25, rel=0.1)
        assert abs(leaf.mean().item()) < 0.05
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_each_process_has_its_rows_of_the_same_noise(tmp_path, monkeypatch):
    run = prepared(tmp_path, "noise")
    whole = FirstStates(run.model, 0, 6, "noise", 1.0, 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    theirs = FirstStates(run.model, 3, 3, "noise", 1.0, 3).rows(slice(1, 3))
    monkeypatch.delenv("WORLD_SIZE")
    mine = whole.rows(slice(4, 6))
    for each in zip(*map(pytree.tree_leaves, (mine, theirs)), strict=True):
        assert each == (None, None) or torch.equal(*each)


def test_fitted_noise_has_the_moments_of_the_states(tmp_path):
    run = prepared(tmp_path, "fitted_noise")
    states = FirstStates(run.model, 0, 4096, "fitted_noise", 1.0, 0)
    assert states.rows(slice(0, 4)) is None
    _, state = loss_from(run, 0, None)
    states.keep([state])
    states.begin(1)
    (((_, drawn),),), (((_, own),),) = states.rows(slice(None)), state
    mean, std = (each.float() for each in moments(own))
    assert ((drawn.mean(0, keepdim=True) - mean).abs() <= 0.1 * std + 1e-6).all()
    torch.testing.assert_close(drawn.std(0).mean(), std.expand_as(drawn[:1]).mean(), rtol=0.05, atol=1e-6)


def test_mixers_whose_state_grows_begin_as_ever(tmp_path):
    for first_state in ("passed", "fitted_noise", "noise"):
        run = prepared(tmp_path, first_state, "mamba2 attention", model__depth=2)
        steps(run, 2)
        run.carried.begin(2)  # type: ignore[union-attr]
        (recurrent,), (attention,) = run.carried.rows(slice(0, 1))  # type: ignore[union-attr]
        assert any(leaf.any() for leaf in pytree.tree_leaves(recurrent) if isinstance(leaf, Tensor))
        assert [leaf for leaf in pytree.tree_leaves(attention) if isinstance(leaf, int)] == [0]


FREE = [
    name
    for name in MIXERS
    if (mixer := build_mixer(name, d_model=32, **VARIANTS.get(name, [{}])[-1])).takes_any_state and passes(mixer)
]


def test_which_states_can_be_any_numbers():
    """Those that are divided by nothing; preconditioned keys take the logarithm of what was written."""
    assert {"mamba", "mamba2", "gla", "gated_delta_net", "rwkv7", "gru", "lstm"} <= set(FREE)
    assert not {"slstm", "mlstm", "linear_attention", "preconditioned_kda", "log_linear_mamba2", "attention"} & {*FREE}


@pytest.mark.parametrize("name", FREE)
def test_a_model_goes_on_from_noise(tmp_path, name):
    mixers = {"model__mixers": {name: VARIANTS.get(name, [{}])[-1]}}
    run = prepared(tmp_path, "noise", name, **mixers)
    assert np.isfinite(steps(run, 2)).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in run.model.parameters())


def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path, monkeypatch):
    options = {"model__pattern": "mamba2", "train__first_state": "fitted_noise", "train__save_every": 3}
    whole = train_here(tiny_config(tmp_path / "whole", **options))[1]
    config, step = tiny_config(tmp_path / "torn", **options), Run.step

    def stopped(run):
        if run.state.step == 4 and run.folder.record()["attempt"] == 1:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(Run, "step", stopped)
    assert [train_here(config)[0] for _ in range(2)] == [130, 0]
    torn = RunFolder(config.folder())
    assert whole.record()["results"] == torn.record()["results"]
    assert (last(whole) / "carried-0.pt").read_bytes() == (last(torn) / "carried-0.pt").read_bytes()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"model__pattern": "attention+hyena"}, "passed is for states of a fixed size, and those of attention, hyena"),
        (
            {"model__pattern": "slstm", "train__first_state": "noise"},
            "noise is for states of a fixed size that any numbers can be, and those of slstm are none",
        ),
        ({"train__first_state_std": 0.1}, "first_state_std is of first_state: noise, and that is passed"),
        ({"task__train_on": [{}, {"length": 8}]}, "task.train_on has 2 sources"),
    ],
    ids=["growing", "dividing", "deviation", "several"],
)  # fmt: skip
def test_what_has_no_first_states_is_refused(tmp_path, others, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **{"model__pattern": "mamba2", "train__first_state": "passed", **others})


def test_streamed_documents_have_their_own(tmp_path):
    changes = streamed(write_texts(tmp_path / "texts"))
    with pytest.raises(ConfigError, match="a window follows the one before it"):
        tiny_config(tmp_path, **{**changes, "train__first_state": "passed"})
