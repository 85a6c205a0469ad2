"""Products of groups of rows, one matrix a group, as custom operators: whole to ``torch.compile``, whatever the groups.

How many rows a group has depends on the data. Only the insides of these operators see it; their results have shapes
that do not depend on it. :func:`sort_by_expert` brings the groups' ends to the CPU, the one wait for a GPU.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def check_range(lowest: int, highest: int, experts: int) -> None:
    """Raise unless -1 (no expert) to ``experts - 1`` holds both."""
    if lowest < -1 or highest >= experts:
        wrong = lowest if lowest < -1 else highest
        right = f"0 to {experts - 1} for {experts} experts, or -1 for none"
        raise ValueError(f"experts: expert_index holds {wrong}, expected {right}")


@torch.library.custom_op("seqarch::sort_by_expert", mutates_args=())
def sort_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The stable order ``[M]`` of ``chosen [M]``, and on the CPU where each expert's rows begin, ``[E + 1]``, with the
    end of the last. Rows of no expert (-1) stand before the first.

    Raises:
        ValueError: an expert is out of range.
    """
    ordered, order = chosen.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(experts + 1, device=chosen.device))
    found = torch.cat([starts, ordered[:1], ordered[-1:]]).cpu()
    if len(chosen):
        check_range(int(found[-2]), int(found[-1]), experts)
    return order, found[: experts + 1].clone()


@sort_by_expert.register_fake
def _(chosen, experts):
    return torch.empty_like(chosen), torch.empty(experts + 1, dtype=torch.int64, device="cpu")


@torch.library.custom_op("seqarch::grouped_matmul", mutates_args=())
def grouped_matmul(rows: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """``rows [M, D]``, sorted, each times its expert's matrix of ``weight [E, D, F]``: ``[M, F]``; of no expert 0."""
    ends = starts.tolist()
    y = rows.new_empty(rows.shape[0], weight.shape[2])
    y[: ends[0]] = 0
    for expert, (start, end) in enumerate(pairwise(ends)):
        if end > start:
            torch.mm(rows[start:end], weight[expert], out=y[start:end])
    return y


@grouped_matmul.register_fake
def _(rows, weight, starts):
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.custom_op("seqarch::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, starts: Tensor) -> Tensor:
    """For each expert, the sum of its rows' outer products ``left [M, D]`` with ``right [M, F]``: ``[E, D, F]``."""
    ends = starts.tolist()
    y = left.new_empty(len(ends) - 1, left.shape[1], right.shape[1])
    for expert, (start, end) in enumerate(pairwise(ends)):
        if end > start:
            torch.mm(left[start:end].T, right[start:end], out=y[expert])
        else:
            y[expert] = 0
    return y


@grouped_outer.register_fake
def _(left, right, starts):
    return left.new_empty(starts.shape[0] - 1, left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, starts = ctx.saved_tensors
    for_rows, for_weight, _ = ctx.needs_input_grad
    drows = grouped_matmul(dy, weight.transpose(1, 2), starts) if for_rows else None
    return drows, grouped_outer(rows, dy, starts) if for_weight else None, None


def _outer_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    left, right, starts = ctx.saved_tensors
    return grouped_matmul(right, dy.transpose(1, 2), starts), grouped_matmul(left, dy, starts), None


grouped_matmul.register_autograd(_matmul_backward, setup_context=_save)
grouped_outer.register_autograd(_outer_backward, setup_context=_save)
