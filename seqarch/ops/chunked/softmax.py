"""Softmax over what a mask leaves, by torch functions that have derivatives of any kind."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Weights along the last axis; 0 where nothing is seen, with gradient 0."""
    some = seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen, -torch.inf).masked_fill(~some, 0).softmax(-1)
    return weights.masked_fill(~seen, 0)


def masked_logsumexp(scores: Tensor, seen: Tensor) -> Tensor:
    """The logarithm of the sum of the exponentials along the last axis; -inf where nothing is seen, with gradient 0."""
    some = seen.any(-1, keepdim=True)
    sums = scores.masked_fill(~seen, -torch.inf).masked_fill(~some, 0).logsumexp(-1)
    return sums.masked_fill(~some.squeeze(-1), -torch.inf)
