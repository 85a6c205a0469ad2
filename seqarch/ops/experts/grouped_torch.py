"""Tokens sorted by expert, one group of matrix products per expert, and the sums taken in the tokens' own order.

Every reordering is a permutation, so nothing is added in an order that could differ from run to run.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from seqarch.ops.experts import groups
from seqarch.ops.experts.inputs import ExpertsInputs


def _matmul(rows: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    ends = starts.tolist()
    y = rows.new_empty(rows.shape[0], weight.shape[2])
    y[: ends[0]] = 0
    for expert, (start, end) in enumerate(pairwise(ends)):
        if end > start:
            torch.mm(rows[start:end], weight[expert], out=y[start:end])
    return y


def _outer(left: Tensor, right: Tensor, starts: Tensor) -> Tensor:
    ends = starts.tolist()
    y = left.new_empty(len(ends) - 1, left.shape[1], right.shape[1])
    for expert, (start, end) in enumerate(pairwise(ends)):
        if end > start:
            torch.mm(left[start:end].T, right[start:end], out=y[expert])
        else:
            y[expert] = 0
    return y


grouped_matmul, grouped_outer = groups.differentiable("grouped", _matmul, _outer)


def run(inputs: ExpertsInputs) -> Tensor:
    return groups.run(grouped_matmul, inputs)
