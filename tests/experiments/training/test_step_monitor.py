"""Steps that go wrong: what is bad, when it is learnt, and what becomes of it."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from experiments.config.schema import TrainConfig
from experiments.replay import replay
from experiments.runs.folder import RunFolder
from experiments.training.loop import Run
from experiments.training.step_monitor import SPIKE_FROM, StepMonitor
from experiments.util.errors import RunnerError
from tests.support.runs import last, same, tensors, tiny_config, train_here

CPU = torch.device("cpu")


def monitor(**changes) -> StepMonitor:
    return StepMonitor(TrainConfig(steps=1, batch_size=1, lr=1.0, **changes), CPU)


def is_bad(watch: StepMonitor, loss: float, norm: float, step: int = 1) -> bool:
    return bool(watch.flag_bad_step(step, torch.tensor(loss), torch.tensor(norm)))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_bad(loss, norm):
    watch = monitor()
    assert is_bad(watch, loss, norm)
    assert not is_bad(watch, 1.0, 1e9, step=2)
    assert [(stats.step, stats.bad) for stats in watch.read()] == [(1, True), (2, False)]
    assert watch.read() == []


def test_a_norm_far_above_its_mean_is_bad_and_does_not_move_the_mean():
    watch = monitor(spike=3.0)
    for _ in range(SPIKE_FROM):
        assert not is_bad(watch, 1.0, 2.0)
    assert not is_bad(watch, 1.0, 5.9)
    for _ in range(10):
        assert is_bad(watch, 1.0, 9.0)
    assert watch.tensors()["mean"] == pytest.approx(2 + 3.9 / (SPIKE_FROM + 1))


def test_the_first_steps_are_no_spikes():
    watch = monitor(spike=3.0)
    assert not any(is_bad(watch, 1.0, norm) for norm in (1.0, 50.0, 1.0, 900.0))


def test_flagging_asks_the_device_for_nothing(monkeypatch):
    """``item`` and ``tolist`` wait for the device; the host comes to know at the reading alone."""

    def refuse(*_):
        raise AssertionError("waited for the device")

    watch = monitor(spike=3.0)
    for name in ("item", "tolist", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    watch.flag_bad_step(1, torch.tensor(1.0), torch.tensor(2.0))
    with pytest.raises(AssertionError, match="waited"):
        watch.read()


def poisoned(monkeypatch, *steps):
    """Let the gradients of these steps, counted from 1, be no numbers."""
    clip = Run.step

    def step(run):
        if run.state.step + 1 in steps:
            handle = run.model.head.weight.register_hook(lambda grad: grad * math.nan)
            loss = clip(run)
            handle.remove()
            return loss
        return clip(run)

    monkeypatch.setattr(Run, "step", step)


def test_a_bad_step_is_skipped_counted_and_kept(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, 3, 10)
    config = tiny_config(tmp_path, train__bad_step="skip")
    code, folder = train_here(config)
    assert code == 0
    assert [line["bad_steps"] for line in folder.metrics()] == [1, 2]
    assert folder.metrics()[1]["grad_norm"] is None
    assert folder.record()["cost"]["bad_steps"] == 2
    assert "step 3 was skipped: the loss is 2." in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in tensors(last(folder)).values())
    kept = np.load(folder.bad / "step-000003.npz")
    batch = Run(config, folder).task.train_batch(0, 2 * 8, 8)
    assert np.array_equal(kept["tokens"], batch.tokens)
    assert np.array_equal(kept["targets"], batch.targets)
    assert math.isnan(kept["grad_norm"])


def test_skipping_is_as_if_the_step_had_not_been_taken(tmp_path, monkeypatch):
    """Routers' biases and their loads too: beside a run in which the same steps do nothing at all."""
    moe = {"model__channel": "moe", "model__channels": {"moe": {"expert_bias": True}}}
    step = Run.step
    poisoned(monkeypatch, 3, 4)
    skipped = train_here(tiny_config(tmp_path / "one", train__bad_step="skip", **moe))[1]

    def idle(run):
        if run.state.step + 1 in (3, 4):
            run.step_monitor.flag_bad_step(run.state.step + 1, torch.ones(()), torch.ones(()))
            return torch.ones(())
        return step(run)

    monkeypatch.setattr(Run, "step", idle)
    idled = train_here(tiny_config(tmp_path / "two", train__bad_step="skip", **moe))[1]
    assert same(tensors(last(skipped)), tensors(last(idled)))


def test_a_bad_step_stops_the_run_and_its_batch_is_kept(tmp_path, monkeypatch):
    poisoned(monkeypatch, 7)
    code, folder = train_here(tiny_config(tmp_path))
    path = folder.bad / "step-000007.npz"
    assert code == 1
    assert "training diverged at step 7: the loss is " in folder.record()["reason"]
    assert f"its batch is {path}; the last good checkpoint is" in folder.record()["reason"]
    assert path.exists()


def test_a_bad_step_is_met_again_to_the_bit(tmp_path):
    """By the weights that its batch met: of a checkpoint before, or from the beginning where none is left."""
    config = tiny_config(tmp_path, train__steps=60, train__spike=1.01, train__bad_step="skip", train__eval_every=25)
    _, folder = train_here(config)
    kept = sorted(folder.bad.iterdir())
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    met = [replay(path) for path in (kept[0], kept[-1])]
    assert [again.began for again in met] == [0, 50]
    for again in met:
        assert (again.loss, again.grad_norm) == (again.recorded.loss, again.recorded.grad_norm)
        assert again.layer is None
        assert math.hypot(*again.gradients.values()) == pytest.approx(again.grad_norm, rel=1e-5)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_a_step_without_numbers_names_the_layer_where_they_end(tmp_path):
    config = tiny_config(tmp_path, train__lr=1e38, train__grad_clip=0.0, model__depth=2)
    _, folder = train_here(config)
    (path,) = folder.bad.iterdir()
    again = replay(path)
    assert math.isnan(again.loss)
    assert math.isnan(again.recorded.loss)
    assert again.layer == 1
    assert not math.isfinite(next(iter(again.gradients.values())))
    assert "not finite from layer 1 on" in str(again)


@pytest.mark.parametrize("content", [None, b"", b"PK", b"not a batch", b"\x93NUMPY\x01\x00"])
def test_what_is_no_batch_of_a_bad_step_is_named(tmp_path, content):
    path = tmp_path / "bad" / "step-000003.npz"
    if content is not None:
        path.parent.mkdir()
        path.write_bytes(content)
    with pytest.raises(RunnerError, match=r"step-000003.npz is not the batch of a bad step"):
        replay(path)


def test_a_batch_with_padding_is_kept_and_met_again_to_the_bit(tmp_path):
    task = {"name": "copying", "length": 16, "shortest": 2, "validation_examples": 8, "test_examples": 8}
    moe = {"model__channel": "moe", "model__channels": {"moe": {"num_experts": 4}}}
    skip = {"train__spike": 1.01, "train__bad_step": "skip", "train__steps": 40, "train__eval_every": 20}
    config = tiny_config(tmp_path, task=task, **skip, **moe)
    _, folder = train_here(config)
    path = max(folder.bad.iterdir())
    assert not np.load(path)["token_mask"].all()
    again = replay(path)
    assert (again.loss, again.grad_norm) == (again.recorded.loss, again.recorded.grad_norm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.full((8, 16), 16)}, "its tokens are 16 to 16, and the task's 0 to 15"),
        ({"targets": np.full((8, 16), -1)}, "its targets are -1 to -1, and the task's 0 to 15"),
        ({"targets": np.full((8, 9), 1)}, "its targets are (8, 9), and its tokens (8, 16)"),
        ({"token_mask": np.ones((2, 2), bool)}, "its token_mask are (2, 2), and its tokens (8, 16)"),
        (
            {"tokens": np.ones((0, 16), int), "targets": np.ones((0, 16), int)},
            "it has 0 rows of 16 tokens, and the run up to 8 of 16",
        ),
    ],
    ids=["tokens", "targets", "length", "mask", "nothing"],
)
def test_a_batch_that_the_task_does_not_have_is_named(tmp_path, change, message):
    config = tiny_config(tmp_path)
    folder = RunFolder(config.folder())
    folder.create(config)
    folder.bad.mkdir()
    whole = {"tokens": np.ones((8, 16), int), "targets": np.ones((8, 16), int)}
    np.savez(folder.bad / "step-000003.npz", **{**whole, **change}, step=3, loss=1.0, grad_norm=1.0, bad=True)
    with pytest.raises(RunnerError, match=re.escape(f"is not the batch of a bad step of this run: {message}")):
        replay(folder.bad / "step-000003.npz")


def test_a_run_without_evaluations_learns_of_a_bad_step_within_sixteen(tmp_path, monkeypatch):
    poisoned(monkeypatch, 3)
    _, folder = train_here(tiny_config(tmp_path, train__steps=1000, train__eval_every=1000))
    assert folder.record()["cost"]["steps"] == 16
