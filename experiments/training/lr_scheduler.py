"""The learning rate of every step: a linear warm-up, then a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

from experiments.config.schema import TrainConfig


def cosine(config: TrainConfig, progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017, "SGDR", eq. 5, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(config: TrainConfig, progress: float) -> float:
    """1, then a straight line to 0 over the last ``decay_share`` of all steps (Hu et al. 2024, "MiniCPM", sec. 4)."""
    begins = 1 - config.decay_share * config.steps / max(config.steps - config.warmup, 1)
    return min(1.0, (1 - progress) / max(1 - begins, 1e-9))


SCHEDULES: dict[str, Callable[[TrainConfig, float], float]] = {
    "cosine": cosine,
    "wsd": warmup_stable_decay,
}
"""By ``train.schedule``: the height, from 1 to 0, at a progress from 0 to 1 through the steps after the warm-up."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step, counted from 0: a linear climb to ``lr``, then the schedule to ``final_lr_ratio * lr``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    height = SCHEDULES[config.schedule](config, (step - config.warmup) / max(config.steps - config.warmup, 1))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * height)
