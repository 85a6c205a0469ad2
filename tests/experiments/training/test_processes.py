"""Two processes that torchrun started give what one gives: losses, gradients, weights, and runs that resume."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.runs.folder import RunFolder
from experiments.training.checkpoints import verified
from tests.support.paths import ROOT
from tests.support.runs import TINY, command_line, last, same, tensors, tiny_config, train_here, until
from tests.support.stacks import COMPARED, COMPILED, STACKS
from tests.support.streamed import streamed, write_texts
from tests.support.two_processes import compare, prepared

pytestmark = pytest.mark.slow

BOUNDS = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-4, 1e-6)}
"""Of gradients and losses, relative and absolute: rounding, in sums of another order."""


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def two(tmp_path_factory) -> Path:
    """The findings of two processes."""
    root = tmp_path_factory.mktemp("two")
    write_texts(root / "texts")
    done = torchrun("-m", "tests.support.two_processes", str(root))
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def one(tmp_path, name: str) -> dict:
    """The findings of one process, which takes a batch in the shares that two have of it."""
    changes = COMPARED[name]
    return compare(tmp_path, {"train__micro_batch": 4, **changes})


@pytest.mark.parametrize("name", [name for name in COMPARED if name not in ("muon", "gathered")])
def test_losses_and_gradients_are_those_of_one_process(two, tmp_path, name):
    rtol, atol = BOUNDS[COMPARED[name]["dtype"]]
    ours, theirs = one(tmp_path, name), torch.load(two / f"{name}-0.pt")
    for (loss, norm, grads), (their_loss, their_norm, their_grads) in zip(ours["steps"], theirs["steps"], strict=True):
        assert their_loss == pytest.approx(loss, rel=rtol)
        assert their_norm == pytest.approx(norm, rel=rtol)
        for mine, other in zip(grads, their_grads, strict=True):
            torch.testing.assert_close(other, mine, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", COMPARED)
def test_both_processes_hold_half_and_agree(two, name):
    first, second = (torch.load(two / f"{name}-{rank}.pt") for rank in (0, 1))
    assert [step[:2] for step in first["steps"]] == [step[:2] for step in second["steps"]]
    assert same(first["parameters"], second["parameters"])
    total = sum(grad.numel() for grad in first["steps"][0][2])
    assert first["held"] + second["held"] == total
    assert first["held"] < 0.7 * total


def test_routers_biases_move_by_the_loads_of_both(two, tmp_path):
    ours, theirs = one(tmp_path, "moe")["parameters"], torch.load(two / "moe-0.pt")["parameters"]
    (name,) = [name for name in ours if name.endswith("expert_bias")]
    assert ours[name].any()
    assert torch.equal(ours[name], theirs[name])


def test_muon_on_shares_is_muon_on_the_whole(two, tmp_path):
    """Its iteration is in bfloat16 and magnifies what is small in a gradient: rounding a matrix of low rank by 2^-9
    turns its update by half. Updates made of each process's rows alone would be 0.6 off.
    """
    ours, theirs = one(tmp_path, "muon")["parameters"], torch.load(two / "muon-0.pt")["parameters"]
    before = compare_start(tmp_path)
    for name, mine in ours.items():
        moved = (mine - before[name]).norm()
        assert (theirs[name] - mine).norm() <= 0.3 * moved, name


def compare_start(tmp_path) -> dict[str, torch.Tensor]:
    changes = {key: value for key, value in COMPARED["muon"].items() if key != "dtype"}
    return prepared(tmp_path, **changes).model.state_dict()


def test_gathering_in_bfloat16_rounds_and_no_more(two, tmp_path):
    ours, theirs = one(tmp_path, "gathered"), torch.load(two / "gathered-0.pt")
    losses, their_losses = ([step[0] for step in found["steps"]] for found in (ours, theirs))
    assert losses != their_losses
    assert their_losses == pytest.approx(losses, rel=0.02)
    assert {grad.dtype for grad in theirs["steps"][0][2]} == {torch.float32}


@pytest.mark.parametrize("stack", STACKS)
def test_two_processes_resume_to_the_bit(two, stack):
    (whole,), (torn,) = ((two / stack / kind / "tiny").iterdir() for kind in ("whole", "torn"))
    whole, torn = RunFolder(whole), RunFolder(torn)
    assert torn.record()["attempt"] == 2
    assert torn.record()["cost"]["processes"] == 2
    assert same(tensors(last(whole)), tensors(last(torn)))
    for rank in (0, 1):
        ours, theirs = ((last(folder) / f"random-{rank}.pt").read_bytes() for folder in (whole, torn))
        assert ours == theirs
    for mine, other in zip(whole.metrics(), torn.metrics(), strict=True):
        assert mine | {"tokens_per_second": 0} == other | {"tokens_per_second": 0}
    assert whole.record()["results"] == torn.record()["results"]


def test_one_process_resumes_from_a_checkpoint_of_two(two, tmp_path):
    """And ends where one process alone ends, up to rounding."""
    config = tiny_config(two / "halfway", train__steps=20, train__eval_checkpoint="last")
    folder = RunFolder(config.folder())
    shutil.rmtree(last(folder))
    assert last(folder).name == "step-000015"
    folder.run_file.unlink()
    assert train_here(config)[0] == 0
    alone = train_here(tiny_config(tmp_path, train__steps=20, train__eval_checkpoint="last"))[1]
    assert folder.record()["cost"]["processes"] == 1
    ours, theirs = tensors(last(alone), "model"), tensors(last(folder), "model")
    for name, mine in ours.items():
        torch.testing.assert_close(theirs[name], mine, rtol=1e-3, atol=1e-4)
    for mine, other in zip(alone.metrics(), folder.metrics(), strict=True):
        assert other["validation_loss"] == pytest.approx(mine["validation_loss"], rel=1e-4)


def test_carried_states_of_two_processes_are_those_of_one(two, tmp_path):
    """To the bit over a stop; up to rounding in another number of processes, which can go on from their checkpoint."""
    (whole,), (torn,) = ((two / "streamed" / kind / "tiny").iterdir() for kind in ("whole", "torn"))
    whole, torn = RunFolder(whole), RunFolder(torn)
    assert same(tensors(last(whole)), tensors(last(torn)))
    for rank in (0, 1):
        ours, theirs = ((last(folder) / f"carried-{rank}.pt").read_bytes() for folder in (whole, torn))
        assert ours == theirs
    options = {**streamed(two / "texts"), "train__eval_every": 4}
    alone = train_here(tiny_config(tmp_path, **options))[1]
    for path in (last(torn), torn.run_file):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert last(torn).name == "step-000008"
    assert train_here(tiny_config(two / "streamed" / "torn", **options))[0] == 0
    assert torn.record()["cost"]["processes"] == 1
    for folder in (whole, torn):
        for mine, other in zip(alone.metrics(), folder.metrics(), strict=True):
            assert other["loss"] == pytest.approx(mine["loss"], rel=1e-4)
            assert other["validation_loss"] == pytest.approx(mine["validation_loss"], rel=1e-4)


def test_threads_that_still_hold_the_last_exchange_fail_no_run(tmp_path):
    """Where the interpreter is taken down under them, five of six such pairs end with SIGABRT."""
    done = torchrun("-m", "tests.support.two_processes", str(tmp_path), "slowed")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_sweep_trains_each_run_by_torchrun_and_sigterm_preempts_it(tmp_path):
    """SIGTERM reaches torchrun alone, as from a scheduler; afterwards one process finishes what two began."""
    arguments = [*TINY, "model=mamba2", "train.steps=100000", "train.save_every=50", "machine.processes=2"]
    command = command_line("experiments.run", *arguments, "train.warmup=0")  # Few steps are left in the end.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        sweep = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: list(tmp_path.glob("runs/mqar/*/checkpoints/step-*")))
        sweep.terminate()
        assert sweep.wait(60) == 130
    finally:
        sweep.kill()
    (path,) = tmp_path.glob("runs/mqar/*")
    folder = RunFolder(path)
    assert folder.status() == "preempted", (tmp_path / "log").read_text()
    step = verified(last(folder))["state"]["step"]
    assert folder.record()["cost"]["steps"] == step
    assert folder.record()["cost"]["processes"] == 2
    assert not folder.lock.is_held()

    folder.config_file.write_text(folder.config_file.read_text().replace("100000", str(step + 3)))
    done = torchrun("-m", "experiments.train", str(path), processes=1)
    assert done.returncode == 0, done.stderr
    assert (folder.status(), folder.record()["cost"]["steps"]) == ("finished", step + 3)
    assert folder.record()["attempt"] == 2


def test_compiled_layers_on_two_processes(tmp_path):
    done = torchrun("-m", "tests.support.two_processes", str(tmp_path), "compiled")
    assert done.returncode == 0, done.stdout + done.stderr
    rtol, atol = BOUNDS[torch.float32]
    changes = {key: value for key, value in COMPILED.items() if key != "train__compile"}
    ours, theirs = compare(tmp_path, {"train__micro_batch": 4, **changes}), torch.load(tmp_path / "compiled-0.pt")
    for (loss, _, grads), (their_loss, _, their_grads) in zip(ours["steps"], theirs["steps"], strict=True):
        assert their_loss == pytest.approx(loss, rel=rtol)
        for mine, other in zip(grads, their_grads, strict=True):
            torch.testing.assert_close(other, mine, rtol=rtol, atol=atol)
