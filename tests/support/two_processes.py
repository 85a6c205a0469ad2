"""The work of two processes, for ``test_processes.py``: started by torchrun, it leaves its findings in a folder.

Everything is in one script, since starting two processes takes longer than all that they do here.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from experiments.runs.folder import RunFolder
from experiments.training import processes
from experiments.training.loop import Run
from experiments.training.lr_scheduler import learning_rate
from experiments.training.run_record import follow, record_run
from tests.support.runs import tiny_config
from tests.support.stacks import COMPARED, COMPILED, STACKS


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def prepared(root: Path, **changes) -> Run:
    config = tiny_config(root, **changes)
    return Run(config, RunFolder(config.folder()))


def compare(root: Path, changes: dict) -> dict:
    """Three steps: each one's loss, norm and gradients, and the parameters after them."""
    torch.set_default_dtype(changes.pop("dtype"))
    run, found = prepared(root, **changes), {"steps": []}
    for step in range(3):
        share = run.engine.share
        loss = run.engine.gradients(run.model, run.task.train_batch(0, step * 8 + processes.rank() * share, share))
        norm = run.engine.clip(run.model)
        grads = [whole(p.grad if p.grad is not None else torch.zeros_like(p)).clone() for p in run.model.parameters()]
        bad = run.step_monitor.flag_bad_step(step + 1, loss, norm)
        run.optimizers.step(learning_rate(run.train_config, step), bad)
        run.engine.update_routers(run.model, bad)
        found["steps"].append((loss.item(), norm.item(), grads))
    found["parameters"] = {name: whole(value).clone() for name, value in run.model.state_dict().items()}
    found["held"] = sum(
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in run.model.parameters()
    )
    torch.set_default_dtype(torch.float32)
    return found


def train(config) -> int:
    """As ``experiments.train`` does it, within this process."""
    folder = RunFolder(config.folder())
    if not processes.is_main():
        code = follow(lambda: Run(config, folder))
        processes.barrier()
        return code
    folder.create(config)
    folder.lock.acquire()
    try:
        return record_run(folder, config, lambda: Run(config, folder))
    finally:
        folder.leave()
        processes.barrier()


def torn_and_whole(root: Path, name: str, changes: dict) -> None:
    """Ten steps straight, and five and five."""
    changes = {**changes, "train__eval_every": 4}
    random.seed(0), np.random.seed(0)
    assert train(tiny_config(root / name / "whole", **changes)) == 0
    random.seed(0), np.random.seed(0)
    step = Run.step

    def preempted_in_step_5(run):
        # One process alone gets the signal, as may happen; both must stop after the same step.
        run.interrupts.requested = run.state.step == 4 and processes.rank() == 1
        return step(run)

    Run.step = preempted_in_step_5
    torn = tiny_config(root / name / "torn", **changes)
    assert train(torn) == 75
    Run.step = step
    torch.rand(3)
    assert train(torn) == 0


def slowed(root: Path) -> None:
    """Steps after which the threads that carry numbers are kept from their end, as on a machine that is busy."""
    compare(root, {"dtype": torch.float32})
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    threads = [each for each in Path("/proc/self/task").iterdir() if "runloop" in (each / "comm").read_text()]
    assert len(threads) == 1, "with two, gloo frees what both hold: see gloo_in_order"
    os.sched_setaffinity(int(threads[0].name), {core})
    os.setpriority(os.PRIO_PROCESS, int(threads[0].name), 19)
    for _ in range(20):
        processes.total(1)


def main() -> None:
    warnings.simplefilter("error")
    torch.use_deterministic_algorithms(True)
    root = Path(sys.argv[1])
    if sys.argv[2:] == ["compiled"]:
        warnings.simplefilter("default")  # torch's own compiler warns
        torch.save(compare(root, dict(COMPILED)), root / f"compiled-{processes.rank()}.pt")
        return
    if sys.argv[2:] == ["slowed"]:
        return slowed(root)
    for name, changes in COMPARED.items():
        found = compare(root / "compared", dict(changes))
        torch.save(found, root / f"{name}-{processes.rank()}.pt")
    for name, changes in STACKS.items():
        torn_and_whole(root, name, changes)
    train(tiny_config(root / "halfway", train__steps=20, train__eval_checkpoint="last"))


if __name__ == "__main__":
    main()
    processes.end(0)
