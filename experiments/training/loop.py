"""The training loop: a plain loop over steps, whose numbers reach the host as seldom as they can.

Example ``i`` of the training stream is a function of (seed, i), so a run that was stopped resumes from its last
checkpoint as if nothing had happened, bit for bit.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.config.build import build_model, build_task
from experiments.config.schema import RunConfig
from experiments.runs.folder import RunFolder
from experiments.training import processes
from experiments.training.checkpoints import Checkpoints, TrainState
from experiments.training.convergence import Convergence
from experiments.training.cost_meter import CostMeter
from experiments.training.engine import Engine
from experiments.training.evaluate import evaluate_split, evaluate_tests
from experiments.training.lr_scheduler import last_step, learning_rate
from experiments.training.optimizers import Optimizers
from experiments.training.run_logger import make_logger
from experiments.training.step_monitor import Diverged, StepMonitor, StepStats
from experiments.util.interrupts import Interrupts, Preempted

CHECK_EVERY = 16
"""Steps after which the host reads the step monitor, besides before each checkpoint."""


class Run:
    """One run in training: its parts, made from the configuration."""

    def __init__(self, config: RunConfig, folder: RunFolder, interrupts: Interrupts | None = None):
        self.config, self.train_config, self.folder = config, config.train, folder
        self.interrupts = interrupts or Interrupts()
        self.engine = Engine(config.train)
        # Every process draws the same initial weights; what is drawn in training is each one's own.
        torch.manual_seed(config.seed)
        self.task = build_task(config)
        self.model = self.engine.prepare(build_model(config))
        torch.manual_seed(config.seed + processes.rank())
        self.optimizers = Optimizers(self.model, config.train)
        self.step_monitor = StepMonitor(config.train, self.engine.device)
        self.cost_meter = CostMeter(self.engine.device)
        self.checkpoints = Checkpoints(folder.checkpoints, config.train.keep_last)
        self.convergence = Convergence(config.train, config.train.batch_size * self.task.length)
        self.state, self.saved_step = TrainState(), None
        self.logger = make_logger(folder, config)

    def train(self) -> dict[str, Any]:
        """Train to the end and return the results."""
        config, state = self.train_config, self.resume()
        # SIGTERM is only noted within the loop: raised in the middle of a step, it would leave half a step behind.
        with self.interrupts.delayed():
            while state.step < self.last_step and not self.is_done():
                # The loss stays on the device: to ask for it would make the host wait, and the device run dry.
                loss = self.step()
                state.step += 1
                self.logger.progress(state.step, loss, self.tokens_per_second())

                # Here alone the host waits for the device. Every step before a checkpoint is checked first,
                # so none is ever written from a model that has diverged; in between, a bad step is found soon.
                if self.is_evaluated(state.step):
                    self.evaluate()
                elif config.save_every and state.step % config.save_every == 0:
                    self.save()
                elif state.step % CHECK_EVERY == 0:
                    self.check_steps()

                # A scheduler may signal one process alone, so that all ask each other: they stop after the same step.
                if processes.total(self.interrupts.requested):
                    self.preempt()
        # The test splits are read once, when nothing is left to choose.
        return self.test()

    @property
    def last_step(self) -> int:
        """The number of steps that training takes, as far as is known."""
        return last_step(self.train_config, self.state.decay_from)

    def is_evaluated(self, step: int) -> bool:
        return step % self.train_config.eval_every == 0 or step == self.last_step

    def resume(self) -> TrainState:
        """Begin from the latest intact checkpoint, or from nothing where there is none; the counters."""
        self.state = self.checkpoints.resume(self.content()) or self.state
        self.saved_step = self.state.step or None
        self.logger.start(self.state.step, self.state.evaluations)
        self.cost_meter.lap()
        return self.state

    def step(self) -> Tensor:
        """One optimizer step on the next batch; its loss, still on the device."""
        number, share = self.state.step, self.engine.share

        # Each process takes its own rows of the batch; where they are in the stream follows from the step alone.
        start = number * self.train_config.batch_size + processes.rank() * share
        loss = self.engine.gradients(self.model, self.task.train_batch(self.config.seed, start, share))

        # Whether the step is bad is decided on the device, and the update obeys it there, so that nobody waits.
        bad = self.step_monitor.flag_bad_step(number + 1, loss, self.engine.clip(self.model))
        self.optimizers.step(learning_rate(self.train_config, number, self.state.decay_from), bad)

        # Routers follow the loads of this very step, which the next forward pass would replace.
        self.engine.update_routers(self.model, bad)
        return loss

    def check_steps(self) -> list[StepStats]:
        """The steps since the last check, once the device has caught up with them.

        Raises:
            Diverged: one was bad, and ``train.bad_step`` is ``stop``.
        """
        checked = self.step_monitor.read()
        self.cost_meter.add_training(self.state)
        for stats in (stats for stats in checked if stats.bad):
            # Batches are not held back for this: the stream gives the same one again.
            batch_size = self.train_config.batch_size
            batch = self.task.train_batch(self.config.seed, (stats.step - 1) * batch_size, batch_size)
            what = f"the loss is {stats.loss} and the gradient's norm {stats.grad_norm}"
            what += f"; its batch is {self.logger.save_batch(stats, batch)}"
            if self.train_config.bad_step == "stop":
                raise self.diverged(stats.step, what)
            self.state.bad_steps += 1
            self.logger.info(f"step {stats.step} was skipped: {what}")
        return checked

    def evaluate(self) -> None:
        """Evaluate on the validation split, log it and write a checkpoint."""
        # The routing is that of the training batch, which each forward pass replaces: read before evaluating.
        routing = self.model.router_metrics()
        last = self.check_steps()[-1]
        metrics = {**last.values(), "lr": self.optimizers.lr, "tokens_per_second": self.tokens_per_second()}

        scores = evaluate_split(self.model, self.task, "validation", self.engine)
        self.cost_meter.add_evaluation(self.state)
        self.state.evaluations += 1
        if not math.isfinite(scores["loss"]):
            raise self.diverged(self.state.step, f"the validation loss is {scores['loss']}")
        self._note_validation(scores[self.task.metric.name], scores["loss"])
        plain = {f"validation_{name}": score for name, score in scores.items() if isinstance(score, float)}

        # The checkpoint comes last: torn before it, the run resumes from the one before and writes both again.
        self.logger.log_metrics(
            {"step": self.state.step, **metrics, "bad_steps": self.state.bad_steps, **plain, **routing}
        )
        self._write_checkpoint()

    def _note_validation(self, value: float, loss: float) -> None:
        """Count a validation metric: the best so far, or one evaluation more without a better one.

        Where the schedule waits for the loss to settle, the decay begins here.
        """
        state = self.state
        state.validation = value
        if state.best is None or self._is_better(value, state.best):
            state.best, state.best_step, state.stale = value, state.step, 0
        else:
            state.stale += 1
        if self.train_config.schedule == "until_converged" and state.decay_from is None:
            state.losses.append(loss)
            state.ending = "target" if self.is_done() else self.convergence.ending(state.losses)
            state.decay_from = None if state.ending in (None, "target") else state.step

    def _is_better(self, value: float, other: float) -> bool:
        return value > other if self.task.metric.higher_is_better else value < other

    def save(self) -> None:
        """Write a checkpoint between two evaluations."""
        self.check_steps()
        self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        self.logger.check()
        self.checkpoints.save(self.content(), self.state)
        self.saved_step = self.state.step
        self.cost_meter.lap()

    def preempt(self) -> None:
        """Write a checkpoint of this very step and end."""
        if self.saved_step != self.state.step:
            self.save()
        raise Preempted(f"stopped by SIGTERM, with a checkpoint of step {self.saved_step}")

    def content(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that a checkpoint holds, and that loading one writes into."""
        state = {"optimizer": self.optimizers.tensors(), "step_monitor": self.step_monitor.tensors()}
        return {"model": self.model.state_dict(), **state}

    def is_done(self) -> bool:
        """Whether the last evaluation was good enough, or too many in a row were no better."""
        config, best = self.train_config, self.state.best
        if best is None:
            return False
        if config.target is not None and (best == config.target or self._is_better(best, config.target)):
            return True
        return bool(config.patience) and self.state.stale >= config.patience

    def test(self) -> dict[str, Any]:
        """The results on the test splits, of the best checkpoint on validation or the last (``train.eval_checkpoint``).

        Where that one is damaged or gone, they are of the next best that is intact, and the results say so.
        """
        content = {"model": self.model.state_dict()}
        chosen, tested, problems = self.checkpoints.load_first(self.test_candidates(), content)
        results = evaluate_tests(self.model, self.task, self.engine)
        chosen_as = {"validation": tested.validation, "checkpoint": chosen.name, "checkpoint_step": tested.step}
        if problems:
            chosen_as["instead_of"] = "; ".join(problems)
            again = f"delete {self.folder.path} to train the run again from the beginning"
            self.logger.info(f"{problems[0]}; {chosen.name} is tested instead, the best that is intact ({again})")
        if self.state.ending:
            chosen_as["stable_phase"] = {"ending": self.state.ending, "steps": self.state.decay_from or self.state.step}
        return {"test": results.pop("test"), **chosen_as, **results}

    def test_candidates(self) -> list[Path]:
        """The checkpoints that may be tested, the right one first. Those between evaluations have no score."""
        config, sign = self.train_config, 1 if self.task.metric.higher_is_better else -1
        known = [state for state in self.checkpoints.states().values() if state.validation is not None]
        scored = [state for state in known if self.is_evaluated(state.step)]
        step = self.state.step
        if config.eval_checkpoint == "best":
            assert self.state.best_step is not None
            step = self.state.best_step
            scored.sort(key=lambda state: (-sign * (state.validation or 0.0), state.step))
        return list(dict.fromkeys(self.checkpoints.path(each) for each in (step, *(state.step for state in scored))))

    def diverged(self, step: int, what: str) -> Diverged:
        """The error that ends a run, with the last checkpoint from before."""
        kept = "no checkpoint had been written yet"
        if self.saved_step is not None:
            kept = f"the last good checkpoint is {self.checkpoints.path(self.saved_step)}"
        return Diverged(f"training diverged at step {step}: {what}; {kept}")

    def tokens_per_second(self) -> float:
        tokens = self.state.step * self.train_config.batch_size * self.task.length
        return tokens / max(self.state.train_seconds + self.cost_meter.seconds(), 1e-9)
