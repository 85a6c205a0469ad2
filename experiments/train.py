"""Trains one run: ``python -m experiments.train runs/mqar/attention-seed0-...``, or ``torchrun -m`` the same.

A plain loop over steps. Example ``i`` of the training stream is a function of (seed, i), so a run that was stopped goes
on from its last checkpoint as if nothing had happened, bit for bit. SIGTERM makes it write a checkpoint first. Exit
codes: 0 finished, 1 failed, 75 preempted (start it again, and it goes on), 130 interrupted.
"""

from __future__ import annotations

from experiments.util.interrupts import INTERRUPTS, Interrupts, Preempted

if __name__ == "__main__":  # Before torch is imported, which takes seconds.
    INTERRUPTS.obey()

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.config.build import build_model, build_task
from experiments.config.schema import RunConfig
from experiments.runs.folder import RunFolder
from experiments.training import processes
from experiments.training.checkpoints import Checkpoints, TrainState
from experiments.training.cost_meter import Meter
from experiments.training.engine import Engine
from experiments.training.evaluate import evaluate, judge_tests
from experiments.training.optimizers import Optimizers
from experiments.training.progress import Heartbeat
from experiments.training.reporter import make_reporter
from experiments.training.run_record import EXIT_CODES, follow, keep_ledger
from experiments.training.step_monitor import Diverged, Reading, Vitals
from experiments.util.errors import RunnerError

READ_EVERY = 16
"""Steps between two readings of the device, besides those before each checkpoint."""


class Run:
    """One run in training: its parts, made from the configuration."""

    def __init__(self, config: RunConfig, folder: RunFolder, interrupts: Interrupts | None = None):
        self.config, self.train_config, self.folder = config, config.train, folder
        self.interrupts = interrupts or Interrupts()
        self.engine = Engine(config.train)
        torch.manual_seed(config.seed)
        self.task = build_task(config)
        self.model = self.engine.prepare(build_model(config))
        torch.manual_seed(config.seed + processes.rank())
        self.optimizers = Optimizers(self.model, config.train)
        self.vitals, self.meter = Vitals(config.train, self.engine.device), Meter(self.engine.device)
        self.checkpoints = Checkpoints(folder.checkpoints, config.train.keep)
        self.state, self.saved_step = TrainState(), None
        self.reporter = make_reporter(folder, config)

    def train(self) -> dict[str, Any]:
        """Train to the end and return the results."""
        config = self.train_config
        self.resume()
        with self.interrupts.delayed():
            while self.state.step < config.steps and not self.is_done():
                loss = self.step()
                self.state.step += 1
                self.reporter.show(self.state.step, loss, self.tokens_per_second())
                if self.state.step % config.eval_every == 0 or self.state.step == config.steps:
                    self.look()
                elif config.save_every and self.state.step % config.save_every == 0:
                    self.save()
                elif self.state.step % READ_EVERY == 0:
                    self.read()
                if processes.total(self.interrupts.requested):
                    self.preempt()
        return self.test()

    def step(self) -> Tensor:
        """One optimizer step on the next batch; its loss, still on the device."""
        number, share = self.state.step, self.engine.share
        start = number * self.train_config.batch_size + processes.rank() * share
        loss = self.engine.gradients(self.model, self.task.train_batch(self.config.seed, start, share))
        bad = self.vitals.judge(number + 1, loss, self.engine.clip(self.model))
        self.optimizers.step(number, bad)
        self.engine.update_routers(self.model, bad)
        return loss

    def read(self) -> list[Reading]:
        """The steps since the last reading, once the device has caught up with them.

        Raises:
            Diverged: one was bad, and ``train.bad_step`` is ``stop``.
        """
        readings = self.vitals.read()
        self.meter.trained(self.state)
        for reading in (reading for reading in readings if reading.bad):
            batch_size = self.train_config.batch_size
            batch = self.task.train_batch(self.config.seed, (reading.step - 1) * batch_size, batch_size)
            what = f"the loss is {reading.loss} and the gradient's norm {reading.grad_norm}"
            what += f"; its batch is {self.reporter.keep_batch(reading, batch)}"
            if self.train_config.bad_step == "stop":
                raise self.diverged(reading.step, what)
            self.state.bad_steps += 1
            self.reporter.tell(f"step {reading.step} was skipped: {what}")
        return readings

    def look(self) -> None:
        """Judge the model on the validation split, write it down and keep a checkpoint."""
        routing = self.model.router_metrics()  # Of the training batch: each forward pass replaces them.
        values = {**self.read()[-1].values(), "lr": self.optimizers.lr, "tokens_per_second": self.tokens_per_second()}
        scores = evaluate(self.model, self.task, "validation", self.engine)
        self.meter.evaluated(self.state)
        self.state.looks += 1
        if not math.isfinite(scores["loss"]):
            raise self.diverged(self.state.step, f"the validation loss is {scores['loss']}")
        metric, best = self.task.metric, self.state.best
        value = self.state.validation = scores[metric.name]
        if best is None or (value > best if metric.higher_is_better else value < best):
            self.state.best, self.state.best_step, self.state.stale = value, self.state.step, 0
        else:
            self.state.stale += 1
        plain = {f"validation_{name}": score for name, score in scores.items() if isinstance(score, float)}
        # The checkpoint comes last: torn before it, the run goes on from the one before and writes both again.
        self.reporter.line({"step": self.state.step, **values, "bad_steps": self.state.bad_steps, **plain, **routing})
        self.write()

    def save(self) -> None:
        """Keep a checkpoint between two looks."""
        self.read()
        self.write()

    def write(self) -> None:
        self.reporter.check()
        self.checkpoints.save(self.content(), self.state)
        self.saved_step = self.state.step
        self.meter.lap()

    def preempt(self) -> None:
        """Keep a checkpoint of this very step and end."""
        if self.saved_step != self.state.step:
            self.save()
        raise Preempted(f"stopped by SIGTERM, with a checkpoint of step {self.saved_step}")

    def resume(self) -> None:
        """Go on from the latest intact checkpoint, if there is one."""
        self.state = self.checkpoints.resume(self.content()) or self.state
        self.saved_step = self.state.step or None
        self.reporter.begin(self.state.step, self.state.looks)
        self.meter.lap()

    def content(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, and loading one writes into."""
        state = {"optimizer": self.optimizers.tensors(), "vitals": self.vitals.tensors()}
        return {"model": self.model.state_dict(), **state}

    def is_done(self) -> bool:
        """Whether the last look at the validation split was good enough, or too many were no better."""
        config, best = self.train_config, self.state.best
        if best is None:
            return False
        if config.target is not None:
            reached = best >= config.target if self.task.metric.higher_is_better else best <= config.target
            if reached:
                return True
        return bool(config.patience) and self.state.stale >= config.patience

    def test(self) -> dict[str, Any]:
        """The test splits, looked at once, with the best checkpoint on validation or the last, as ``select`` says.

        Where that one is damaged or gone, it is with the next best that is intact, and the results say so.
        """
        chosen, tested, problems = self.checkpoints.load_first(self.choices(), {"model": self.model.state_dict()})
        judged = judge_tests(self.model, self.task, self.engine)
        chosen_as = {"validation": tested.validation, "checkpoint": chosen.name, "checkpoint_step": tested.step}
        if problems:
            chosen_as["instead_of"] = "; ".join(problems)
            again = f"delete {self.folder.path} to train the run again from the beginning"
            self.reporter.tell(f"{problems[0]}; {chosen.name} is tested instead, the best that is intact ({again})")
        return {"test": judged.pop("test"), **chosen_as, **judged}

    def choices(self) -> list[Path]:
        """The checkpoints that may be tested, the right one first. Those between two looks were never judged."""
        config, sign = self.train_config, 1 if self.task.metric.higher_is_better else -1
        known = [state for state in self.checkpoints.states().values() if state.validation is not None]
        looks = [state for state in known if state.step % config.eval_every == 0 or state.step == config.steps]
        step = self.state.step
        if config.select == "best":
            assert self.state.best_step is not None
            step = self.state.best_step
            looks.sort(key=lambda state: (-sign * (state.validation or 0.0), state.step))
        return list(dict.fromkeys(self.checkpoints.path(each) for each in (step, *(state.step for state in looks))))

    def diverged(self, step: int, what: str) -> Diverged:
        kept = "no checkpoint had been written yet"
        if self.saved_step is not None:
            kept = f"the last good checkpoint is {self.checkpoints.path(self.saved_step)}"
        return Diverged(f"training diverged at step {step}: {what}; {kept}")

    def tokens_per_second(self) -> float:
        tokens = self.state.step * self.train_config.batch_size * self.task.length
        return tokens / max(self.state.train_seconds + self.meter.seconds(), 1e-9)


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m experiments.train", description="Train the run of a folder made by experiments.run."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int, help="stop when the process with this number is gone")
    arguments = parser.parse_args()
    INTERRUPTS.obey()
    try:
        return attempt(RunFolder(arguments.folder), arguments.parent)
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CODES["preempted" if INTERRUPTS.requested else "failed"]
    finally:
        INTERRUPTS.ignore()


def attempt(folder: RunFolder, parent: int | None) -> int:
    """Train as the only process at work in a folder, or beside the one that is; returns the exit code."""
    config = folder.config()
    folder.check_links()
    if not processes.is_main():
        return follow(lambda: Run(config, folder, INTERRUPTS))
    folder.claim.take(hurry=lambda: INTERRUPTS.requested)
    with Heartbeat(folder, parent):
        if folder.status() == "finished":  # By another sweep, after this one had looked.
            return EXIT_CODES["finished"]
        return keep_ledger(folder, config, lambda: Run(config, folder, INTERRUPTS))


if __name__ == "__main__":
    processes.end(main())
