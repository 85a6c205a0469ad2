"""Whether training is sound: each step is flagged on the device, and the host reads the flags now and then."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.config.schema import TrainConfig
from experiments.util.errors import RunnerError

SPIKE_FROM = 20
"""Sound steps before a gradient can count as a spike."""

MEMORY = 100
"""Sound steps over which the running mean of the gradient's norm is taken."""


DIVERGED = "training diverged"
"""How the reason of such a run begins."""


class Diverged(RunnerError):
    """The loss is not finite any more."""


class StepStats(NamedTuple):
    """One step: its number, counted from 1, its loss and gradient norm, and whether it was bad."""

    step: int
    loss: float
    grad_norm: float
    bad: bool

    def values(self) -> dict[str, float | None]:
        """For the metrics; JSON has no number that is not finite."""
        pairs = {"loss": self.loss, "grad_norm": self.grad_norm}
        return {name: value if math.isfinite(value) else None for name, value in pairs.items()}


class StepMonitor:
    """Flags bad steps by their loss and gradient norm, and keeps both until they are read.

    A step is bad where one of them is not finite and, with ``train.spike``, where the norm is above that many times its
    running mean over the sound steps before.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self._spike = config.spike
        self._unread: list[tuple[int, Tensor]] = []
        self._mean, self._seen = torch.zeros((), device=device), torch.zeros((), device=device)

    def flag_bad_step(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1 where step number ``step``, counted from 1, is bad and 0 where it is sound: a scalar on the device."""
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        if self._spike:
            bad |= (self._seen >= SPIKE_FROM) & (grad_norm > self._spike * self._mean)
            mean = self._mean.lerp(grad_norm.float(), 1 / (self._seen + 1).clamp(max=MEMORY))
            self._mean.copy_(torch.where(bad, self._mean, mean))
            self._seen += ~bad
        self._unread.append((step, torch.stack([loss.float(), grad_norm.float(), bad.float()])))
        return bad.float()

    def read(self) -> list[StepStats]:
        """The steps since the last reading; this waits for the device."""
        if not self._unread:
            return []
        steps, values = zip(*self._unread, strict=True)
        self._unread.clear()
        rows = torch.stack(values).tolist()
        return [StepStats(step, loss, norm, bool(bad)) for step, (loss, norm, bad) in zip(steps, rows, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """Its part of a checkpoint."""
        return {"mean": self._mean, "seen": self._seen}
