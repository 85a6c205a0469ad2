"""Benchmarks of a small model's training step, by the runner's own engine, optimizers and task.

Two layers of width 64 learn multi-query associative recall. In so small a model, what lies around the kernels is most
of a step: calls, norms, the logits of positions that nobody asks about. The baseline is the same step with the logits
of every position and torch's cross entropy of them. On one thread, as the runner's workers are:

    OMP_NUM_THREADS=1 python -m experiments.bench --benchmarks training_step_mamba2 --lengths 64 512 2048
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.benchmark import Benchmark, Call, Cost, Implementation, Inputs, Workload
from experiments.bench.sizes import Sizes
from experiments.config.build import build_model, build_task, resolve
from experiments.config.schema import RunConfig, run_config
from experiments.training.engine import Engine
from experiments.training.optimizers import Optimizers
from experiments.training.step_monitor import StepMonitor
from seqarch.models import LanguageModel

MIXERS = ("attention", "delta_net", "gated_delta_net", "gla", "mamba2", "mamba", "mlstm", "kda")
VOCABULARIES = (64, 8192)
WIDTH, DEPTH = 64, 2
TOKENS, MOST_ROWS = 8192, 32
"""Of a batch: so many tokens, in at most so many rows."""

READ_EVERY = 16
"""Steps after which the host reads the step monitor, as in the training loop."""


def _config(mixer: str, vocabulary: int, length: int, rows: int) -> RunConfig:
    pairs = 8 if vocabulary == min(VOCABULARIES) else min(64, length // 8)
    composed = {
        "experiment": "bench",
        "seed": 0,
        "runs": "runs",
        "model": {"name": mixer, "pattern": mixer, "d_model": WIDTH, "depth": DEPTH},
        "task": {"name": "mqar", "vocab_size": vocabulary, "length": length, "pairs": pairs},
        "train": {"steps": 10**6, "batch_size": rows, "lr": 1e-3, "device": "cpu", "threads": torch.get_num_threads()},
    }
    return resolve(run_config(composed))


class Step:
    """One training step after another, of the parts that a run has."""

    def __init__(self, config: RunConfig, change: Callable[[LanguageModel], None] | None = None):
        self.config, self.number = config, 0
        self.engine, self.task = Engine(config.train), build_task(config)
        torch.manual_seed(config.seed)
        self.model = self.engine.prepare(build_model(config))
        if change is not None:
            change(self.model)
        self.optimizers = Optimizers(self.model, config.train)
        self.monitor = StepMonitor(config.train, self.engine.device)

    def __call__(self) -> Tensor:
        """Its loss."""
        rows = self.config.train.batch_size
        loss = self.engine.gradients(self.model, self.task.train_batch(0, self.number * rows, rows))
        bad = self.monitor.flag_bad_step(self.number + 1, loss, self.engine.clip(self.model))
        self.optimizers.step(self.number, bad)
        self.engine.update_routers(self.model, bad)
        self.number += 1
        if self.number % READ_EVERY == 0:
            self.monitor.read()
        return loss


def with_all_logits(model: LanguageModel) -> None:
    """Give a model the loss that one would write without :meth:`LanguageModel.loss`."""

    def loss(
        tokens: Tensor,
        targets: Tensor,
        state: Any = None,
        cu_seqlens: Any = None,
        *,
        token_mask: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        logits = model(tokens, state, cu_seqlens, token_mask=token_mask)[0]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **how)

    model.loss = loss  # type: ignore[method-assign]


def _implementation(
    mixer: str, vocabulary: int, change: Callable[[LanguageModel], None] | None = None
) -> Implementation:
    def bind(inputs: Inputs) -> tuple[Call, Inputs]:
        step = Step(_config(mixer, vocabulary, inputs["length"], inputs["rows"]), change)
        return lambda length, rows: step(), inputs

    return Implementation(bind)


def _workload(mixer: str, vocabulary: int) -> Workload:
    def inputs(sizes: Sizes) -> Inputs:
        return {"length": sizes.length, "rows": max(1, min(MOST_ROWS, TOKENS // sizes.length))}

    def cost(sizes: Sizes, inputs: Inputs) -> Cost:
        config: Any = _config(mixer, vocabulary, inputs["length"], inputs["rows"])
        with torch.device("meta"):
            model = build_model(config)
        return Cost(model.flops(inputs["length"], inputs["rows"]), 4 * model.num_parameters())

    return Workload(inputs, cost)


def _benchmark(mixer: str, vocabulary: int) -> Benchmark:
    return Benchmark(
        title=f"the runner's training step, {TOKENS} tokens in at most {MOST_ROWS} rows, {DEPTH} layers of {mixer} of"
        f" width {WIDTH}, vocabulary {vocabulary}",
        workload=_workload(mixer, vocabulary),
        ours={"seqarch": _implementation(mixer, vocabulary)},
        baselines={"cpu": {"all logits": _implementation(mixer, vocabulary, with_all_logits)}},
        modes=("training step",),
        longest=2048,
    )


BENCHMARKS: dict[str, Benchmark] = {
    f"training_step_{mixer}" + ("" if vocabulary == min(VOCABULARIES) else f"_v{vocabulary}"): _benchmark(
        mixer, vocabulary
    )
    for mixer in MIXERS
    for vocabulary in VOCABULARIES
}
