"""Experts as products of groups of rows, one matrix a group, in custom operators: whole to ``torch.compile``.

How many rows a group has depends on the data. Only the insides of these operators see it; their results have shapes
that do not depend on it. :func:`sort_by_expert` brings the groups' ends to the CPU, the one wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.dispatch.autocast import autocast_is_on
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.experts.inputs import ExpertsInputs

NUMBERS = 8
"""Of a row, what every kind of product takes: 16 bytes in bfloat16."""


def check_range(lowest: int, highest: int, experts: int) -> None:
    """Raise unless -1 (no expert) to ``experts - 1`` holds both."""
    if lowest < -1 or highest >= experts:
        wrong = lowest if lowest < -1 else highest
        right = f"0 to {experts - 1} for {experts} experts, or -1 for none"
        raise ValueError(f"experts: expert_index holds {wrong}, expected {right}")


@torch.library.custom_op("seqarch::sort_by_expert", mutates_args=())
def sort_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The stable order ``[M]`` of ``chosen [M]``, and on the CPU where each expert's rows begin, ``[E + 1]``, with the
    end of the last. Rows of no expert (-1) come before the first.

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


Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def differentiable(name: str, matmul: Product, outer: Product) -> tuple[Any, Any]:
    """Custom operators ``NAME_matmul`` and ``NAME_outer``, each the other's gradient, to any order.

    Args:
        matmul: ``rows [M, D]``, sorted, each times its expert's matrix of ``weight [E, D, F]``: ``[M, F]``; 0 for rows
            of no expert.
        outer: for each expert, the sum of its rows' outer products of ``left [M, D]`` and ``right [M, F]``, as
            ``[E, D, F]``.
    """
    product = torch.library.custom_op(f"seqarch::{name}_matmul", matmul, mutates_args=())
    sums = torch.library.custom_op(f"seqarch::{name}_outer", outer, mutates_args=())
    product.register_fake(lambda rows, weight, starts: rows.new_empty(rows.shape[0], weight.shape[2]))
    sums.register_fake(lambda left, right, starts: left.new_empty(starts.shape[0] - 1, left.shape[1], right.shape[1]))

    def product_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, starts = ctx.saved_tensors
        for_rows, for_weight, _ = ctx.needs_input_grad
        drows = product(dy, weight.transpose(1, 2), starts) if for_rows else None
        return drows, sums(rows, dy, starts) if for_weight else None, None

    def sums_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        left, right, starts = ctx.saved_tensors
        return product(right, dy.transpose(1, 2), starts), product(left, dy, starts), None

    product.register_autograd(product_backward, setup_context=_save)
    sums.register_autograd(sums_backward, setup_context=_save)
    return product, sums


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def run(product: Product, inputs: ExpertsInputs) -> Tensor:
    """y in x's shape and dtype, by a product of rows and their experts' matrices."""
    flat = inputs.flat()
    x, expert_index, expert_weight = flat.x, flat.expert_index, flat.expert_weight
    (tokens, top_k), width = expert_index.shape, x.shape[-1]
    order, starts = sort_by_expert(expert_index.flatten(), inputs.w_in.shape[0])
    # Copying each token k times first makes the gather a permutation, whose backward adds no two rows.
    rows = x[:, None].expand(-1, top_k, -1).flatten(0, 1).index_select(0, order)
    dtype = product_dtype(x)
    rows = rows.to(dtype)

    def affine(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = product(rows, weight.to(dtype), starts)
        return y if bias is None else y + _of_each_row(product, bias.to(dtype), starts, len(rows))

    value = affine(rows, inputs.w_in, inputs.b_in)
    gate = None if inputs.w_gate is None else affine(rows, inputs.w_gate, inputs.b_gate)
    outputs = affine(inputs.hidden(value, gate), inputs.w_out, inputs.b_out)
    y = torch.empty_like(outputs).index_copy(0, order, outputs).view(tokens, top_k, width)
    wide = accumulation_dtype(y, expert_weight)
    return (y.to(wide) * expert_weight[..., None].to(wide)).sum(dim=1).to(x.dtype).view(inputs.x.shape)


def _of_each_row(product: Product, bias: Tensor, starts: Tensor, rows: int) -> Tensor:
    """The bias ``[M, F]`` of each row's expert, 0 for rows of no expert.

    By a product, which has its gradient added up in the order of the rows.
    """
    one = F.pad(bias.new_ones(rows, 1), (0, NUMBERS - 1))
    return product(one, F.pad(bias[:, None], (0, 0, 0, NUMBERS - 1)), starts)


def product_dtype(x: Tensor) -> torch.dtype:
    """The products' dtype: x's, or autocast's, which does not see into a custom operator."""
    if x.dtype == torch.float64 or not autocast_is_on(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)
