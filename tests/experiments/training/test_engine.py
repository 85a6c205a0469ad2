"""One process: micro-batches, precision, recomputing and compiling against the plain step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.runs.folder import RunFolder
from experiments.tasks import TASKS
from experiments.tasks.task import IGNORED, Batch
from experiments.training.engine import Engine, choose_device
from experiments.training.loop import Run
from experiments.util import environment
from experiments.util.errors import RunnerError
from seqarch.layers.channel.router import Router
from tests.support.runs import last, tensors, tiny_config, train_here
from tests.support.small_tasks import SMALL
from tests.support.stacks import STACKS

RECURRENT, MOE = {"model__pattern": "mamba2"}, {"model__channel": "moe"}


def prepared(tmp_path, **changes) -> Run:
    config = tiny_config(tmp_path, **changes)
    return Run(config, RunFolder(config.folder()))


def gradients(run: Run) -> tuple[float, list[torch.Tensor]]:
    loss = run.engine.gradients(run.model, run.task.train_batch(0, 0, 8))
    return loss.item(), [parameter.grad for parameter in run.model.parameters()]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batches_give_the_gradients_of_the_batch(tmp_path, double, size):
    loss, plain = gradients(prepared(tmp_path, **RECURRENT))
    other, parts = gradients(prepared(tmp_path, train__micro_batch=size, **RECURRENT))
    assert other == pytest.approx(loss, rel=1e-12)
    for one, two in zip(plain, parts, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pattern", ["mamba2 attention", "moba nsa"])
def test_segments_of_whole_sequences_change_no_bit(tmp_path, pattern):
    """And shorter ones the gradients, not the loss; recomputed or not, in whatever micro-batches."""
    changes = {"model__pattern": pattern, "model__depth": 2, "model__mixers": STACKS["sparse"]["model__mixers"]}
    loss, plain = gradients(prepared(tmp_path, **changes))
    for length in (16, 100):
        other, same = gradients(prepared(tmp_path, train__bptt=length, **changes))
        assert other == loss
        assert all(torch.equal(one, two) for one, two in zip(plain, same, strict=True))
    cut = {"train__bptt": 6, **changes}
    other, shorter = gradients(prepared(tmp_path, **cut))
    assert other == pytest.approx(loss, rel=1e-5)
    assert not all(torch.allclose(one, two, rtol=1e-3) for one, two in zip(plain, shorter, strict=True))
    for how in ({"train__activation_checkpointing": True}, {"train__micro_batch": 3}):
        _, again = gradients(prepared(tmp_path, **how, **cut))
        for one, two in zip(shorter, again, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_segments_hold_the_memory_of_one(tmp_path):
    task = {"name": "parity", "length": 256, "validation_examples": 8, "test_examples": 8}
    whole = saved_at_once(prepared(tmp_path, task=task, **RECURRENT))
    assert saved_at_once(prepared(tmp_path, task=task, train__bptt=32, **RECURRENT)) < 0.25 * whole


def saved_at_once(run: Run) -> int:
    """The most bytes that autograd holds for a backward pass at a time; each ends with the next forward pass."""
    held, most = {}, [0]

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        most[0] = max(most[0], sum(held.values()))
        return tensor

    run.model.embedding.register_forward_pre_hook(lambda *_: held.clear())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(run)
    return most[0]


def test_micro_batches_are_as_large_as_asked_for(tmp_path, monkeypatch):
    run, seen = prepared(tmp_path, train__micro_batch=3), []
    run.model.embedding.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    gradients(run)
    assert seen == [3, 3, 2]


def test_padding_counts_in_no_router_and_an_ignored_target_does(tmp_path):
    """Whatever is there, in whatever micro-batches; evaluation gets the mask, too."""
    options = {"expert_bias": True, "capacity_factor": 1.0, "num_experts": 4}
    found = []
    for filling, size in ((0, 0), (7, 0), (7, 2)):
        run = prepared(tmp_path, train__micro_batch=size, model__channels={"moe": options}, **MOE)
        (router,) = (module for module in run.model.modules() if isinstance(module, Router))
        batch = run.task.train_batch(0, 0, 8)
        asked = int((batch.targets != IGNORED).sum())
        real = np.arange(16) < np.array([16, 9] * 4)[:, None]
        padded = Batch(np.where(real, batch.tokens, filling), np.where(real, batch.targets, IGNORED), real)
        run.engine.gradients(run.model, batch)
        assert router.load.sum() == 2 * batch.tokens.size > 2 * asked
        router.load.zero_()
        run.engine.gradients(run.model, padded)
        assert router.load.sum() == 2 * real.sum()
        scored = [part[real] for part in run.engine.evaluate_batch(run.model, padded)]
        found.append([*(parameter.grad for parameter in run.model.parameters()), *map(torch.from_numpy, scored)])
    for one, two in zip(found[0][1:], found[1][1:], strict=True):  # The embedding has a row for what fills.
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SMALL)
def test_a_score_is_of_what_is_asked_alone(name):
    """So that an evaluation need not compute the rest, which is 0 and false."""
    task = TASKS[name](SMALL[name])
    batch = next(iter(task.evaluation("validation")))
    asked, found, drawn = batch.targets != IGNORED, [], np.random.default_rng(0)
    losses, hits = drawn.random(asked.shape), drawn.random(asked.shape) > 0.5
    for elsewhere in (0, 1):
        found.append(
            task.score(batch.targets, np.where(asked, losses, elsewhere), np.where(asked, hits, elsewhere > 0))
        )
    assert found[0] == found[1]


def test_an_evaluation_computes_the_logits_of_what_is_asked(tmp_path):
    run, seen = prepared(tmp_path, model__channel="swiglu"), []
    batch = run.task.train_batch(0, 0, 8)
    logits = run.model(torch.from_numpy(batch.tokens))[0]
    run.model.head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    losses, hits = run.engine.evaluate_batch(run.model, batch)
    asked, targets = batch.targets != IGNORED, torch.from_numpy(batch.targets)
    assert seen == [(asked.sum(), 16)]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    np.testing.assert_allclose(losses, expected.detach(), rtol=1e-5)
    assert (hits == (logits.argmax(-1) == targets).numpy()).all()


@pytest.mark.parametrize("size", [1, 3])
def test_a_routers_mean_over_tokens_is_that_of_the_batch_however_it_is_padded(tmp_path, double, size):
    """Each part counts by the tokens that were read in it; of a row of one token that is one."""
    options = {"load_balance_weight": 0.0, "router_z_weight": 0.5, "num_experts": 4}
    real, found = np.arange(16) < np.array([1, 9, 16, 2] * 2)[:, None], []
    for micro_batch in (0, size):
        run = prepared(tmp_path, train__micro_batch=micro_batch, model__channels={"moe": options}, **MOE)
        batch = run.task.train_batch(0, 0, 8)
        run.engine.gradients(run.model, Batch(batch.tokens, np.where(real, batch.targets, IGNORED), real))
        found.append([parameter.grad for parameter in run.model.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def saved_bytes(run: Run) -> int:
    """The most that the graph of the step holds: bytes of the storages that autograd saves."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(run)
    return sum(seen.values())


@pytest.mark.parametrize("stack", [RECURRENT, MOE], ids=["recurrent", "moe"])
def test_recomputing_changes_no_bit_and_keeps_less(tmp_path, stack):
    changes = {**stack, "model__depth": 2}
    loss, plain = gradients(prepared(tmp_path, **changes))
    other, again = gradients(prepared(tmp_path, train__activation_checkpointing=True, **changes))
    assert loss == other
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
    kept = saved_bytes(prepared(tmp_path, train__activation_checkpointing=True, **changes))
    assert kept < 0.5 * saved_bytes(prepared(tmp_path, **changes))


def test_bfloat16_is_autocast_over_float32_parameters(tmp_path):
    run = prepared(tmp_path, train__precision="bfloat16", **RECURRENT)
    seen = []
    run.model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    loss, grads = gradients(run)
    exact, plain = gradients(prepared(tmp_path, **RECURRENT))
    assert seen == [torch.bfloat16]
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert loss != exact
    assert loss == pytest.approx(exact, rel=0.02)
    one, two = (torch.cat([grad.flatten() for grad in each]) for each in (plain, grads))
    assert (one - two).square().mean().sqrt() / one.square().mean().sqrt() < 0.05


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, inside its compiler
def test_compiled_graphs_on_disk_are_those_of_these_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    prepared(tmp_path, **RECURRENT)
    assert torch.compiler.config.cache_key_tag == ""
    monkeypatch.setattr(environment, "sources_digest", lambda: "other")
    prepared(tmp_path, train__compile=True, **RECURRENT)
    assert torch.compiler.config.cache_key_tag == "seqarch other"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, as are these
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("stack", [RECURRENT, MOE], ids=["recurrent", "moe"])
def test_compiled_layers_give_the_same_gradients(tmp_path, stack, checkpointed):
    torch._dynamo.reset()
    loss, plain = gradients(prepared(tmp_path, **stack))
    run = prepared(tmp_path, train__compile=True, train__activation_checkpointing=checkpointed, **stack)
    counted = torch._dynamo.utils.counters
    counted.clear()
    other, compiled = gradients(run)
    assert counted["stats"]["unique_graphs"] >= 1
    assert other == pytest.approx(loss, rel=1e-6)
    for one, two in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__precision": "bfloat16", "model__pattern": "mamba2, moba", "model__depth": 2},
        {"train__activation_checkpointing": True, "train__micro_batch": 3, "model__channel": "moe"},
    ],
)
def test_a_run_trains_so(tmp_path, changes):
    code, folder = train_here(tiny_config(tmp_path, **changes))
    assert code == 0
    assert {tensor.dtype for tensor in tensors(last(folder), "model").values()} == {torch.float32}


def test_no_cuda_here_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunnerError, match="torch sees no CUDA device"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RunnerError, match=r"train\.batch_size is 8, which 3 processes cannot share evenly"):
        Engine(tiny_config(tmp_path).train)
