"""The training loop: a plain loop over steps, whose numbers reach the host as seldom as they can.

Example ``i`` of a training stream is a function of (seed, i), and which stream a step takes its batch from one of the
seed, the step and the counters, so a run that was stopped resumes from its last checkpoint as if nothing had happened,
bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.config.build import build_model
from experiments.config.data import build_data
from experiments.config.schema import RunConfig
from experiments.runs.folder import RunFolder
from experiments.training import processes
from experiments.training.checkpoints import Checkpoints, TrainState
from experiments.training.convergence import Convergence, Ending
from experiments.training.cost_meter import CostMeter
from experiments.training.engine import Engine
from experiments.training.evaluate import evaluate_split, evaluate_tests
from experiments.training.first_states import make_carried
from experiments.training.lr_scheduler import last_step, learning_rate
from experiments.training.objectives import make_objective
from experiments.training.optimizers import Optimizers
from experiments.training.run_logger import make_logger
from experiments.training.step_monitor import DIVERGED, Diverged, StepMonitor, StepStats
from experiments.training.weights import Weights
from experiments.util.errors import RunnerError
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
        self.data = build_data(config)
        self.task = self.data.task
        self._check_shares()
        self.model = self.engine.prepare(build_model(config))
        self.weights = Weights(self.model, config.train)
        self.engine.objective = make_objective(config.train, self.engine.device)
        torch.manual_seed(config.seed + processes.rank())
        self.optimizers = Optimizers(self.model, config.train)
        self.step_monitor = StepMonitor(config.train, self.engine.device)
        self.cost_meter = CostMeter(self.engine.device)
        self.checkpoints = Checkpoints(folder.checkpoints, config.train.keep_last)
        self.carried = make_carried(config, self.task, self.model, self.engine.share)
        self.state, self.saved_step = self.begin(), None
        self.logger = make_logger(folder, config)

    def train(self) -> dict[str, Any]:
        """Train to the end and return the results."""
        config, state = self.train_config, self.resume()
        # SIGTERM is only noted within the loop: raised in the middle of a step, it would leave half a step behind.
        with self.interrupts.delayed():
            while state.step < self.last_step and not self.is_done():
                # The loss stays on the device: to ask for it would make the host wait, and the device run dry.
                loss = self.step()
                self.count_step()
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

    def _check_shares(self) -> None:
        for source in self.data.sources:
            if source.batch_size % processes.count():
                raise RunnerError(
                    f"a step of task.train_on[{source.stream}] has {source.batch_size} sequences, which"
                    f" {processes.count()} processes cannot share evenly; give it a batch_size"
                )

    def begin(self) -> TrainState:
        """The counters before the first step."""
        count = len(self.data.sources) if len(self.data.sources) > 1 else 0
        mixed = 0 if self.data.is_curriculum else count
        return TrainState(taken=[0] * count, recent=[0] * mixed, recent_losses=[0.0] * mixed)

    def resume(self) -> TrainState:
        """Begin from the latest intact checkpoint or, where there is none, from ``train.start_from`` or from nothing.

        Returns:
            The counters.
        """
        self.restore()
        self.saved_step = self.state.step or None
        self.logger.start(self.state.step, self.state.evaluations)
        self.cost_meter.lap()
        return self.state

    def restore(self, last: float = math.inf) -> None:
        """The counters, tensors and carried states of the latest intact checkpoint up to a step, or of the start."""
        found = self.checkpoints.resume({**self.weights.to_fill(), **self._of_training()}, last)
        self.state = found or self.start()
        if self.carried is not None:
            self.carried.forget()
            if found is not None:
                self.carried.restore(self.checkpoints.carried(found.step, self.engine.device))

    def start(self) -> TrainState:
        """Begin before the first step, with the weights that ``train.start_from`` names, if any; the counters."""
        self.weights.start(self.logger.info)
        return self.begin()

    def step(self) -> Tensor:
        """One optimizer step on the next batch; its loss, still on the device."""
        number, state = self.state.step, self.state

        # Each process takes its own rows of the batch; where they are in the stream follows from the step alone.
        source = self.data.source(number, state.stage)
        share = source.batch_size // processes.count()
        batch = source.batch(self.config.seed, number, processes.rank() * share, share)
        if self.carried is not None:
            self.carried.begin(number)
        loss = self.engine.gradients(self.model, batch, source.micro_batch, self.carried)

        # Whether the step is bad is decided on the device, and the update obeys it there, so that nobody waits.
        bad = self.step_monitor.flag_bad_step(number + 1, loss, self.engine.clip(self.model))
        self.optimizers.step(learning_rate(self.train_config, number, state.decay_from, state.stage_began), bad)

        # A state that is no number would spoil every step after; to know, the host waits where steps are skipped.
        if self.carried is not None and self.train_config.bad_step == "skip" and bad.item():
            self.carried.forget()

        # Routers follow the loads of this very step, which the next forward pass would replace.
        self.engine.update_routers(self.model, bad)
        return loss

    def count_step(self) -> None:
        """Count a step that was taken."""
        state = self.state
        if state.taken:
            state.taken[self.data.number(state.step, state.stage)] += 1
        state.step += 1

    def check_steps(self) -> list[StepStats]:
        """The steps since the last check, once the device has caught up with them.

        Raises:
            Diverged: one was bad, and ``train.bad_step`` is ``stop``.
        """
        checked = self.step_monitor.read()
        self._log_steps(checked)
        self.cost_meter.add_training(self.state)
        for stats in (stats for stats in checked if stats.bad):
            # Batches are not held back for this: the stream gives the same one again. No stage begins in between.
            batch = self.data.source(stats.step - 1, self.state.stage).batch(self.config.seed, stats.step - 1)
            what = f"the loss is {stats.loss} and the gradient's norm {stats.grad_norm}"
            what += f"; its batch is {self.logger.save_batch(stats, batch)}"
            if self.train_config.bad_step == "stop":
                raise self.diverged(stats.step, what)
            self.state.bad_steps += 1
            self.logger.info(f"step {stats.step} was skipped: {what}")
        for stats in (stats for stats in checked if self.state.recent and not stats.bad):
            number = self.data.number(stats.step - 1, self.state.stage)
            self.state.recent[number] += 1
            self.state.recent_losses[number] += stats.loss
        return checked

    def _log_steps(self, checked: Sequence[StepStats]) -> None:
        """Log those of every ``train.log_every`` steps, which the host has read for the check; it waits for no others.

        The line of a step with an evaluation is written there. The speed is that since the last check or evaluation.
        """
        config, state, every = self.train_config, self.state, self.train_config.log_every
        logged = [stats for stats in checked if every and stats.step % every == 0
                  and not (stats.step == state.step and self.is_evaluated(stats.step))]  # fmt: skip
        if not logged:
            return
        seconds, stage = max(self.cost_meter.seconds(), 1e-9), state.stage
        tokens = sum(self.data.source(stats.step - 1, stage).tokens for stats in checked)
        rates = (learning_rate(config, stats.step - 1, state.decay_from, state.stage_began) for stats in logged)
        self.logger.log_steps(
            [{"step": stats.step, **stats.values(), "lr": rate, "tokens_per_second": tokens / seconds}
             for stats, rate in zip(logged, rates, strict=True)]
        )  # fmt: skip

    def evaluate(self) -> None:
        """Evaluate on the validation split, log it and write a checkpoint."""
        # The routing is that of the training batch, which each forward pass replaces: read before evaluating.
        routing = self.model.router_metrics()
        last = self.check_steps()[-1]
        metrics = {**last.values(), "lr": self.optimizers.lr, "tokens_per_second": self.tokens_per_second()}

        task, stage = self.data.validated(self.state.stage), {"stage": self.state.stage} if self._is_curriculum else {}
        scores = evaluate_split(self.model, task, "validation", self.engine)
        self.cost_meter.add_evaluation(self.state)
        self.state.evaluations += 1
        if not math.isfinite(scores["loss"]):
            raise self.diverged(self.state.step, f"the validation loss is {scores['loss']}")
        stage |= self._note_validation(scores[self.task.metric.name], scores["loss"])
        plain = {f"validation_{name}": score for name, score in scores.items() if isinstance(score, float)}
        metrics |= self._losses_by_source()

        # The checkpoint comes last: torn before it, the run resumes from the one before and writes both again.
        self.logger.log_metrics(
            {"step": self.state.step, **metrics, "bad_steps": self.state.bad_steps, **plain, **stage, **routing}
        )
        self._write_checkpoint()

    def _losses_by_source(self) -> dict[str, float]:
        """Of a mixture the mean training loss on each source since the last evaluation, which counts anew from here."""
        state = self.state
        pairs = zip(self.data.sources, state.recent, state.recent_losses, strict=False)
        found = {f"loss_{source.name}": total / number for source, number, total in pairs if number}
        state.recent, state.recent_losses = [0] * len(state.recent), [0.0] * len(state.recent)
        return found

    def _note_validation(self, value: float, loss: float) -> dict[str, str]:
        """Count a validation metric: the best so far, or one evaluation more without a better one.

        Where the schedule waits for the loss to settle, the decay begins here, or a curriculum's next stage.

        Returns:
            As ``ending`` what ended the stable phase, or the stage, at this evaluation; nothing where it goes on.
        """
        state = self.state
        state.validation = value
        if state.best is None or self._is_better(value, state.best):
            state.best, state.best_step, state.stale = value, state.step, 0
        else:
            state.stale += 1
        if self.train_config.schedule != "until_converged" or state.decay_from is not None:
            return {}
        state.losses.append(loss)
        ending = self._ending(value)
        if ending is not None:
            self.end_phase(ending)
        return {} if ending is None else {"ending": ending}

    def _ending(self, value: float) -> Ending | None:
        """What ends the stable phase, or the stage, at this evaluation."""
        config, state = self.train_config, self.state
        rule = Convergence(config, self.data.tokens_per_step(state.stage), state.stage_began)
        if self._is_last_stage:
            return "target" if self.is_done() else rule.ending(state.losses)
        if rule.is_spent(state.losses):
            return "budget"
        return "target" if self._reaches(value, config.stage_target) else rule.ending(state.losses)

    def end_phase(self, ending: Ending) -> None:
        """Begin the decay or, where a stage was learnt and another one follows, the next stage."""
        state = self.state
        if self._is_last_stage or ending == "budget":
            state.ending = ending
            state.decay_from = None if ending == "target" else state.step
        else:
            state.stage_endings.append(ending)
            state.stage, state.stage_began, state.losses = state.stage + 1, state.step, []
            state.best, state.best_step, state.stale = None, None, 0

    @property
    def _is_curriculum(self) -> bool:
        return self.data.is_curriculum

    @property
    def _is_last_stage(self) -> bool:
        return not self._is_curriculum or self.state.stage == len(self.data.sources) - 1

    def _reaches(self, value: float, target: float | None) -> bool:
        return target is not None and (value == target or self._is_better(value, target))

    def _is_better(self, value: float, other: float) -> bool:
        return value > other if self.task.metric.higher_is_better else value < other

    def save(self) -> None:
        """Write a checkpoint between two evaluations."""
        self.check_steps()
        self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        self.logger.check()
        self.checkpoints.save(self.content(), self.state, None if self.carried is None else self.carried.plain())
        self.saved_step = self.state.step
        self.cost_meter.lap()

    def preempt(self) -> None:
        """Write a checkpoint of this very step and end."""
        if self.saved_step != self.state.step:
            self.save()
        raise Preempted(f"stopped by SIGTERM, with a checkpoint of step {self.saved_step}")

    def content(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that a checkpoint holds."""
        return {**self.weights.content(), **self._of_training()}

    def _of_training(self) -> dict[str, dict[str, Tensor]]:
        """What training alone needs of a checkpoint, and what loading one writes into."""
        return {"optimizer": self.optimizers.tensors(), "step_monitor": self.step_monitor.tensors()}

    def is_done(self) -> bool:
        """Whether the last evaluation was good enough, or too many in a row were no better."""
        config, best = self.train_config, self.state.best
        if best is None or not self._is_last_stage:
            return False
        return self._reaches(best, config.target) or (bool(config.patience) and self.state.stale >= config.patience)

    def test(self) -> dict[str, Any]:
        """The results on the test splits, of the best checkpoint on validation or the last (``train.eval_checkpoint``).

        Where that one is damaged or gone, they are of the next best that is intact, and the results say so.
        """
        chosen, tested, problems = self.checkpoints.load_first(self.test_candidates(), self.weights.to_fill())
        results = evaluate_tests(self.model, self.data.tests, self.engine, self.data.trained_to)
        chosen_as = {"validation": tested.validation, "checkpoint": chosen.name, "checkpoint_step": tested.step}
        if problems:
            chosen_as["instead_of"] = "; ".join(problems)
            again = f"delete {self.folder.path} to train the run again from the beginning"
            self.logger.info(f"{problems[0]}; {chosen.name} is tested instead, the best that is intact ({again})")
        if self.state.ending:
            chosen_as["stable_phase"] = {"ending": self.state.ending, "steps": self.state.decay_from or self.state.step}
        if self._is_curriculum:
            chosen_as["stages"] = self._stages()
        return {"test": results.pop("test"), **chosen_as, **results}

    def _stages(self) -> list[dict[str, Any]]:
        """Each stage that was begun: its options, its steps, and what ended it."""
        state = self.state
        endings = [*state.stage_endings, state.ending]
        rows = zip(self.data.sources, self.steps_by_source(), endings, strict=False)
        return [{"options": dict(source.overrides), "steps": steps, "ending": ending} for source, steps, ending in rows]

    def steps_by_source(self) -> list[int]:
        """The steps that were taken on each source of the data."""
        return self.state.taken or [self.state.step]

    def test_candidates(self) -> list[Path]:
        """The checkpoints that may be tested, the right one first. Those between evaluations have no score.

        Nor have those of a curriculum's earlier stages, whose scores are of other data.
        """
        config, sign = self.train_config, 1 if self.task.metric.higher_is_better else -1
        known = [state for state in self.checkpoints.states().values() if state.validation is not None]
        scored = [state for state in known if self.is_evaluated(state.step) and state.step > self.state.stage_began]
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
        return Diverged(f"{DIVERGED} at step {step}: {what}; {kept}")

    def tokens_per_second(self) -> float:
        tokens = self.data.tokens(self.steps_by_source())
        return tokens / max(self.state.train_seconds + self.cost_meter.seconds(), 1e-9)
