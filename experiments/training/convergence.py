"""When training has converged: the rate stays until the validation loss stops falling, then it decays.

The rule of ``train.schedule: until_converged``. At each evaluation the best validation loss of the last quarter of the
steps so far is compared with the best before; where it is less than ``train.least_improvement`` better, relative to
that, the stable phase is over and the rate falls over ``train.decay_share`` as many steps more. Losses can be flat for
long before a model learns, so the quarter has to hold ``train.plateau_tokens`` at least. In a curriculum the rule holds
for each stage by itself, whose steps are then counted from its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from experiments.config.schema import TrainConfig

WINDOW = 0.25
"""The share of the steps so far over which the loss has to improve."""

Ending = Literal["target", "plateau", "budget"]
"""What ended the stable phase: the target was reached, the loss stopped falling, or the steps were used up."""


@dataclass(frozen=True)
class Convergence:
    """The rule for one run, or for one stage of a curriculum.

    Attributes:
        tokens: of a training step.
        began: the step at which the losses begin to count.
    """

    config: TrainConfig
    tokens: float
    began: int = 0

    def ending(self, losses: Sequence[float]) -> Ending | None:
        """What ends the stable phase at this evaluation; ``None`` where it goes on.

        Args:
            losses: the validation loss at every evaluation so far, ``train.eval_every`` steps apart.
        """
        if self.has_converged(losses):
            return "plateau"
        return "budget" if self.is_spent(losses) else None

    def is_spent(self, losses: Sequence[float]) -> bool:
        """Whether the steps leave no room for another evaluation and a decay after it."""
        following = self.began + (len(losses) + 1) * self.config.eval_every
        return following + math.ceil(self.config.decay_share * following) > self.config.steps

    def has_converged(self, losses: Sequence[float]) -> bool:
        """Whether the loss no longer improves over the window."""
        before = losses[: max(len(losses) - self.window(len(losses)), 0)]
        if not before:
            return False
        best = min(before)
        return best - min(losses[len(before) :]) < self.config.least_improvement * abs(best)

    def window(self, evaluations: int) -> int:
        """How many of the last evaluations count as the window, after so many."""
        patient = self.config.plateau_tokens / (self.tokens * self.config.eval_every)
        return max(math.ceil(WINDOW * evaluations), math.ceil(patient), 1)
