"""Trains one run: ``python -m experiments.train runs/mqar/attention-seed0-...``

A plain loop over steps. Example ``i`` of the training stream is a function of (seed, i), so a run that was interrupted
goes on from its last checkpoint as if nothing had happened. Exit codes: 0 finished, 1 failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.building import build_model, build_task
from experiments.checkpoints import TrainState, load_checkpoint, save_checkpoint
from experiments.config import RunConfig, TrainConfig, to_dict
from experiments.errors import RunnerError
from experiments.ledger import keep_ledger
from experiments.progress import Heartbeat, ProgressFile, obey_signals
from experiments.records import RunFolder
from experiments.tasks import Task
from experiments.tasks.task import IGNORED, Batch
from experiments.trackers import make_tracker
from seqarch.models import LanguageModel, parameter_groups


class Diverged(RunnerError):
    """The loss is no number any more."""


class Run:
    """One run in training: its parts, made from the configuration."""

    def __init__(self, config: RunConfig, folder: RunFolder):
        self.config, self.train_config, self.folder = config, config.train, folder
        self.device = choose_device(config.train.device)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.seed)
        self.task = build_task(config)
        self.model = build_model(config).to(self.device)
        groups = parameter_groups(self.model, config.train.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.train.lr, betas=(0.9, 0.95))
        self.state, self.saved_step = TrainState(), None
        self.tracker = make_tracker(config.tracker.name, config.tracker.options, folder.path, to_dict(config))

    def train(self) -> dict[str, Any]:
        """Train to the end and return the results."""
        if self.folder.last_checkpoint.exists():
            self.state = load_checkpoint(self.folder.last_checkpoint, self.device, self.model, self.optimizer)
            self.saved_step = self.state.step
        self.folder.keep_metrics(lambda line: line["step"] <= self.state.step)
        config = self.train_config
        progress = ProgressFile(self.folder, config.steps, self.state.step)
        while self.state.step < config.steps and not self.is_done():
            started = time.perf_counter()
            values = self.step()
            self.state.step += 1
            self.state.train_seconds += time.perf_counter() - started
            values["tokens_per_second"] = self.tokens_per_second()
            progress.show(self.state.step, values["loss"], values["tokens_per_second"])
            if self.state.step % config.eval_every == 0 or self.state.step == config.steps:
                self.look(values)
        return self.test()

    def step(self) -> dict[str, float]:
        """One optimizer step on the next batch."""
        config = self.train_config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.state.step)
        batch = self.task.train_batch(self.config.seed, self.state.step * config.batch_size, config.batch_size)
        tokens, targets = to_device(batch, self.device)
        logits, _ = self.model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
        total = loss + self.model.auxiliary_loss()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        if not math.isfinite(total.item()) or not math.isfinite(norm.item()):
            raise self.diverged(f"the loss is {total.item()} and the gradient's norm {norm.item()}")
        self.optimizer.step()
        self.model.update_routers()
        return {"loss": loss.item(), "grad_norm": norm.item(), "lr": self.optimizer.param_groups[0]["lr"]}

    def look(self, values: dict[str, float]) -> None:
        """Judge the model on the validation split, write it down and keep a checkpoint."""
        routing = self.model.router_metrics()  # Of the training batch: each forward pass replaces them.
        started = time.perf_counter()
        scores = evaluate(self.model, self.task, "validation", self.device)
        self.state.eval_seconds += time.perf_counter() - started
        if not math.isfinite(scores["loss"]):
            raise self.diverged(f"the validation loss is {scores['loss']}")
        metric = self.task.metric
        value, best = scores[metric.name], self.state.best
        improved = best is None or (value > best if metric.higher_is_better else value < best)
        if improved:
            self.state.best, self.state.best_step, self.state.stale = value, self.state.step, 0
        else:
            self.state.stale += 1
        self.state.validation = value
        plain = {f"validation_{name}": score for name, score in scores.items() if isinstance(score, float)}
        line = {"step": self.state.step, **values, **plain, **routing}
        # last.pt comes last: torn before it, the run goes on from the look before and writes all three again.
        self.folder.append_metrics(**line)
        paths = [*([self.folder.best_checkpoint] if improved else []), self.folder.last_checkpoint]
        save_checkpoint(paths, self.model, self.optimizer, self.state)
        self.saved_step = self.state.step
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        self.tracker.log(self.state.step, numbers)
        print(" ".join(f"{name} {value:.5g}" for name, value in numbers.items()), flush=True)

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
        """The test split, looked at once, with the best checkpoint on validation or the last, as ``select`` says."""
        chosen = self.folder.best_checkpoint if self.train_config.select == "best" else self.folder.last_checkpoint
        tested = load_checkpoint(chosen, self.device, self.model)
        name = self.task.metric.name
        scores = evaluate(self.model, self.task, "test", self.device)
        return {
            "test": scores[name],
            "validation": tested.validation,
            "checkpoint": chosen.name,
            "checkpoint_step": tested.step,
            **{f"test_{key}": value for key, value in scores.items() if key != name and isinstance(value, float)},
            **({"curve": scores["curve"]} if "curve" in scores else {}),
        }

    def diverged(self, what: str) -> Diverged:
        kept = f"the last good checkpoint is {self.folder.last_checkpoint} of step {self.saved_step}"
        if self.saved_step is None:
            kept = "no checkpoint had been written yet"
        return Diverged(f"training diverged at step {self.state.step + 1}: {what}; {kept}")

    def tokens_per_second(self) -> float:
        return self.state.step * self.train_config.batch_size * self.task.length / max(self.state.train_seconds, 1e-9)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step, counted from 0: a linear climb, then half a cosine."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(config.steps - config.warmup, 1)
    low = config.final_lr_ratio
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))


def evaluate(model: LanguageModel, task: Task, split: str, device: torch.device) -> dict[str, Any]:
    """The task's metrics on a whole split."""
    model.eval()
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    with torch.no_grad():
        for batch in task.evaluation(split):
            tokens, targets = to_device(batch, device)
            logits = model(tokens)[0].float()
            losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
            hits = logits.argmax(-1) == targets
            parts.append((batch.targets, losses.cpu().numpy(), hits.cpu().numpy()))
    model.train()
    return task.score(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(batch.tokens).to(device), torch.from_numpy(np.ascontiguousarray(batch.targets)).to(device)


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise RunnerError("train.device is 'cuda', but torch sees no CUDA device here; choose 'cpu' or 'auto'")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the run of a folder made by experiments.run.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int, help="stop when the process with this number is gone")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.folder)
    obey_signals()
    try:
        config = folder.config()
        folder.claim.take()
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with Heartbeat(folder, arguments.parent):
        if folder.status() == "finished":  # By another sweep, after this one had looked.
            return 0
        return keep_ledger(folder, config, lambda: Run(config, folder))


if __name__ == "__main__":
    sys.exit(main())
