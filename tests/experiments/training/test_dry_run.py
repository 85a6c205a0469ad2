from __future__ import annotations

import resource

import pytest
import torch

from experiments.config.schema import to_dict
from experiments.runs.folder import RunFolder
from experiments.sweeps.execute import execute
from experiments.sweeps.status import SweepStatus
from experiments.training.dry_run import SavedBytes, in_bytes, in_flops, plan
from experiments.training.loop import Run
from seqarch.layers import detach_state
from tests.support.runs import tiny_config
from tests.support.stacks import STACKS


@pytest.mark.parametrize("changes", [*STACKS.values(), {"train__micro_batch": 3}, {"train__precision": "bfloat16"}])
def test_the_plan_is_what_a_run_takes(tmp_path, changes):
    config = tiny_config(tmp_path, train__optimizer="muon", **changes)
    planned = plan(config)
    run = Run(config, RunFolder(config.folder()))
    assert planned.parameters == run.model.num_parameters()
    assert planned.parameter_bytes == sum(p.numel() * p.element_size() for p in run.model.parameters())
    assert planned.optimizer_bytes == sum(t.numel() * t.element_size() for t in run.optimizers.tensors().values())
    assert planned.state_bytes == run.model.state_bytes(16)
    assert planned.flops == 3 * run.model.flops(16, 8)
    rows = planned.micro_batch
    batch, kept = run.task.train_batch(0, 0, rows), []
    for each in (batch._replace(targets=batch.tokens), batch):
        saved = SavedBytes(run.model)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            run.engine.gradients(run.model, each)
        kept.append(saved.total)
    # The step itself scales the loss of the batch, which saves a few numbers more.
    assert planned.activation_bytes == pytest.approx(kept[0], rel=0.01)
    assert kept[1] <= kept[0]


def test_the_plan_of_several_lengths_is_that_of_the_largest(tmp_path):
    entries = [{"length": 8, "pairs": 1, "share": 3}, {"length": 32, "pairs": 4, "batch_size": 6}]
    planned = plan(tiny_config(tmp_path, task__train_on=entries))
    one = {"task__length": 32, "task__pairs": 4, "train__batch_size": 6}
    alone = plan(tiny_config(tmp_path, **one))
    assert (planned.micro_batch, planned.length, planned.state_length) == (6, 32, 32)
    assert (planned.activation_bytes, planned.tokens, planned.flops) == (
        alone.activation_bytes,
        alone.tokens,
        alone.flops,
    )
    assert planned.all_tokens == 10 * (3 * 8 * 16 + 6 * 32) / 4
    staged = {"task__train_on": [{}, {}], "task__order": "curriculum", "train__schedule": "until_converged"}
    assert plan(tiny_config(tmp_path, **staged)).all_tokens == 10 * 8 * 16
    assert "for the backward pass of 6 sequences of 32 tokens" in str(planned)


@pytest.mark.parametrize("pattern", ["mamba2", "attention"])
def test_the_plan_of_a_segment_is_what_its_backward_pass_keeps(tmp_path, pattern):
    config = tiny_config(tmp_path, train__bptt=4, model__pattern=pattern)
    planned, run = plan(config), Run(config, RunFolder(config.folder()))
    tokens = torch.zeros(8, 16, dtype=torch.int64)
    state = detach_state(run.model(tokens[:, :12])[1])
    saved = SavedBytes(run.model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        run.model.loss(tokens[:, 12:], tokens[:, 12:], state, reduction="sum")
    assert planned.activation_bytes == pytest.approx(saved.total, rel=0.01)
    assert planned.activation_bytes < plan(tiny_config(tmp_path, model__pattern=pattern)).activation_bytes


def test_recomputing_leaves_the_inputs_and_one_layer(tmp_path):
    deep = {"model__pattern": "mamba2", "model__depth": 6}
    plain, less = (
        plan(tiny_config(tmp_path, train__activation_checkpointing=wanted, **deep)) for wanted in (False, True)
    )
    single = plan(tiny_config(tmp_path, **{**deep, "model__depth": 1}))
    inputs = 6 * 8 * 16 * 32 * 4
    assert less.activation_bytes == single.activation_bytes + inputs
    assert less.activation_bytes < plain.activation_bytes


def test_a_model_larger_than_the_memory_is_planned_without_it(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned = plan(tiny_config(tmp_path, model__d_model=8192, model__depth=48, model__channel="swiglu"))
    assert planned.parameter_bytes > 2**36
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    assert "GiB" in str(planned)


def test_a_dry_run_prints_and_leaves_no_folder(tmp_path, command_here, capfd):
    assert command_here("train.dry_run=true", "model=mamba2") == 0
    shown = capfd.readouterr().out
    assert "mamba2-seed0-" in shown
    assert "planned, nothing was trained" in shown
    for word in ("parameters", "activations", "state", "per step"):
        assert f"\n    {word} " in shown
    assert not list(tmp_path.glob("runs/mqar/*"))


def test_a_dry_run_is_that_of_the_same_run(tmp_path):
    assert tiny_config(tmp_path, train__dry_run=True).folder() == tiny_config(tmp_path).folder()


def test_a_folder_alone_can_be_made(tmp_path):
    config = tiny_config(tmp_path, machine__processes=0)
    sweep = SweepStatus(tmp_path / "sweep")
    sweep.create()
    execute(to_dict(config), sweep, 0)
    (entry,) = sweep.entries()
    folder = RunFolder(config.folder())
    assert (entry["status"], entry["message"]) == ("made", f"torchrun ... -m experiments.train {folder.path}")
    assert folder.config() == config
    assert folder.status() is None


def test_numbers_read_well():
    assert in_bytes(0) == "0 bytes"
    assert in_bytes(3 * 2**20) == "3 MiB"
    assert in_flops(1.5e12) == "1.5 TFLOPs"
