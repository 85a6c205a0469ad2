"""Repeats a bad step: ``seqarch replay runs/mqar/mamba2-seed0-.../bad/step-000123.npz``

The weights are those that the batch met: the steps since the last checkpoint before it that is still there, or since
the beginning, are taken once more. One process repeats a run of one process to the bit, one of several up to
rounding. Nothing is written.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from experiments.config.data import Data
from experiments.config.schema import TrackerConfig
from experiments.runs.folder import RunFolder
from experiments.tasks import TaskError
from experiments.tasks.task import IGNORED, Batch
from experiments.training.loop import CHECK_EVERY, Run
from experiments.training.run_logger import NullLogger
from experiments.training.step_monitor import StepStats
from experiments.util.errors import MALFORMED, RunnerError
from experiments.util.program import program

SHOWN = 8
"""Parameters, those of the largest gradients first."""


@dataclass(frozen=True)
class Replay:
    """A bad step as it was recorded, and as it is now.

    Attributes:
        recorded: in training.
        began: the step of the checkpoint that this began from; 0 for the beginning.
        loss, grad_norm: now.
        layer: the first one, counted from 1, with an output that is not finite; ``None`` if there is none.
        gradients: the norm of each parameter's gradient, the largest first and before them those that are no numbers.
    """

    recorded: StepStats
    began: int
    loss: float
    grad_norm: float
    layer: int | None
    gradients: dict[str, float]

    def __str__(self) -> str:
        recorded, of = self.recorded, len(self.gradients)
        lines = [
            f"step {recorded.step}, with the steps after {self.began} taken again",
            f"    recorded: loss {recorded.loss}, gradient norm {recorded.grad_norm}",
            f"    now:      loss {self.loss}, gradient norm {self.grad_norm}",
            f"    outputs:  {'all are finite' if self.layer is None else f'not finite from layer {self.layer} on'}",
            f"    gradients, the largest of {of}:",
        ]
        largest = list(self.gradients.items())[:SHOWN]
        return "\n".join(lines + [f"        {norm:<12.5g}{name}" for name, norm in largest])


def replay(path: Path) -> Replay:
    """Go back to the step of a batch that training kept, and take it without moving the weights.

    Raises:
        RunnerError: it is no such batch.
    """
    recorded, batch = _read(path)
    folder = RunFolder(path.parent.parent)
    config = folder.config()
    if not 1 <= recorded.step <= config.train.steps:
        raise RunnerError(f"{path} is of step {recorded.step}, and the run has the steps 1 to {config.train.steps}")
    run = Run(replace(config, tracker=TrackerConfig()), folder)
    if odd := _odd(batch, run.data):
        raise RunnerError(f"{path} is not the batch of a bad step of this run: {odd}")
    run.logger = NullLogger()
    began = _go_back(run, recorded.step - 1)
    layers: list[int] = []
    for number, layer in enumerate(run.model.stack.layers, 1):
        layer.register_forward_hook(lambda _, __, output, number=number: _note(layers, number, output))
    source = run.data.source(recorded.step - 1, run.state.stage)
    if run.carried is not None:
        run.carried.begin(recorded.step - 1)
    loss = run.engine.gradients(run.model, batch, source.micro_batch, run.carried)
    norms = {name: p.grad.norm().item() for name, p in run.model.named_parameters() if p.grad is not None}
    order = sorted(norms, key=lambda name: (math.isfinite(norms[name]), -norms[name]))
    return Replay(
        recorded,
        began,
        loss.item(),
        run.engine.clip(run.model).item(),
        min(layers, default=None),
        {name: norms[name] for name in order},
    )


def _read(path: Path) -> tuple[StepStats, Batch]:
    try:
        with np.load(path) as kept:
            stats = StepStats(*(kept[name].item() for name in StepStats._fields))
            parts = (kept["tokens"], kept["targets"], kept.get("token_mask"))
            batch = Batch(*parts, begins=kept.get("begins"))
        if any(type(value) is not kind for value, kind in zip(stats, (int, float, float, bool), strict=True)):
            raise ValueError(f"it holds {stats}")
        kinds = list(zip(batch.read().values(), (np.int64, np.int64, np.bool_, np.bool_), strict=True))
        if any(each.dtype != kind or each.ndim != 2 for each, kind in kinds if each is not None):
            held = (f"{each.dtype} {each.shape}" for each, _ in kinds if each is not None)
            raise ValueError(f"it holds {' and '.join(held)}")
    except (*MALFORMED, OSError) as error:
        there = sorted(str(each) for each in path.parent.glob("step-*.npz"))
        kept = f"; {path.parent} holds {', '.join(each.rpartition('/')[2] for each in there)}" if there else ""
        raise RunnerError(f"{path} is not the batch of a bad step ({error}){kept}") from error
    return stats, batch


def _odd(batch: Batch, data: Data) -> str | None:
    """A property of a batch that no batch of a run's data has; ``None`` where there is none."""
    rows, length = batch.tokens.shape
    known: dict[int, int] = {}
    for source in data.sources:
        known[source.task.length] = max(source.batch_size, known.get(source.task.length, 0))
    if not 1 <= rows <= known.get(length, 0):
        given = " or ".join(f"up to {most} of {each}" for each, most in known.items())
        return f"it has {rows} rows of {length} tokens, and the run {given}"
    for name, part in batch.read().items():
        if part is not None and part.shape != batch.tokens.shape:
            return f"its {name} are {part.shape}, and its tokens {batch.tokens.shape}"
    asked = batch.targets[batch.targets != IGNORED]
    for name, part in (("tokens", batch.tokens), ("targets", asked)):
        if part.size and not 0 <= part.min() <= part.max() < data.task.vocab_size:
            return f"its {name} are {part.min()} to {part.max()}, and the task's 0 to {data.task.vocab_size - 1}"
    return None


def _go_back(run: Run, step: int) -> int:
    """Put a run into the state that it had after a step; the step that this began from.

    What an evaluation on the way ended, a stage or the stable phase, is taken from the metrics.
    """
    endings = {line["step"]: line["ending"] for line in run.folder.metrics() if "ending" in line}
    run.restore(step)
    began = run.state.step
    while run.state.step < step:
        run.step()
        run.count_step()
        if run.state.step % CHECK_EVERY == 0:
            run.step_monitor.read()
        if run.state.step in endings:
            run.end_phase(endings[run.state.step])
    return began


def _note(layers: list[int], number: int, output: object) -> None:
    """Note a layer whose output, the first of what it returns, is not finite."""
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, torch.Tensor) and not first.isfinite().all():
        layers.append(number)


def main() -> int:
    parser = argparse.ArgumentParser(program("replay"), description="Repeat a bad step of a run.")
    parser.add_argument("batch", type=Path, help="a file of the folder bad in a run's folder")
    try:
        print(replay(parser.parse_args().batch))
    except (RunnerError, TaskError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
