"""What is done to attention's scores before their softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def capped(scores: Tensor, logit_cap: float) -> Tensor:
    """``c tanh(scores / c)``, or the scores where c is 0."""
    return logit_cap * torch.tanh(scores / logit_cap) if logit_cap else scores
