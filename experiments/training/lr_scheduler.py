"""The learning rate of every step: a linear warm-up, then a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

from experiments.config.schema import TrainConfig


def cosine(config: TrainConfig, step: int, decay_from: int | None) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017, "SGDR", eq. 5, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * _share(config.warmup, config.steps, step)))


def warmup_stable_decay(config: TrainConfig, step: int, decay_from: int | None) -> float:
    """1, then a straight line to 0 over the last ``decay_share`` of all steps (Hu et al. 2024, "MiniCPM", sec. 4)."""
    return 1 - _share(config.steps * (1 - config.decay_share), config.steps, step)


def until_converged(config: TrainConfig, step: int, decay_from: int | None) -> float:
    """The same, with a decay that begins when the stable phase has converged."""
    return 1.0 if decay_from is None else 1 - _share(decay_from, last_step(config, decay_from), step)


SCHEDULES: dict[str, Callable[[TrainConfig, int, int | None], float]] = {
    "cosine": cosine,
    "wsd": warmup_stable_decay,
    "until_converged": until_converged,
}
"""By ``train.schedule``: the height, from 1 to 0, at a step after the warm-up."""


def learning_rate(config: TrainConfig, step: int, decay_from: int | None = None, stage_began: int = 0) -> float:
    """The rate of a step, counted from 0: a linear climb to ``lr``, then the schedule to ``final_lr_ratio * lr``.

    Args:
        decay_from: of ``until_converged``, the step from which the rate falls; ``None`` in the stable phase.
        stage_began: the first step of a curriculum's stage, which begins with a climb of ``stage_warmup`` steps.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if stage_began and step - stage_began < config.stage_warmup:
        return config.lr * (step - stage_began + 1) / config.stage_warmup
    height = SCHEDULES[config.schedule](config, step, decay_from)
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * height)


def last_step(config: TrainConfig, decay_from: int | None) -> int:
    """The number of steps that training takes, as far as is known."""
    if decay_from is None:
        return config.steps
    return min(decay_from + math.ceil(config.decay_share * decay_from), config.steps)


def _share(begin: float, end: float, step: int) -> float:
    """How much of the way from one step to another is done, from 0 to 1."""
    return min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
