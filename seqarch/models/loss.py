"""Cross entropy of a head's logits, which are held once.

``F.cross_entropy(features @ weight.T, targets)`` holds a vocabulary of numbers per token four times: logits, their
log-probabilities, and the gradient of each. Here the gradient of the logits takes their place (Hsu et al. 2024, "Liger
Kernel", section 3.2), and all else is done in blocks of rows that stay in the cache. That is faster, too, as each new
page of memory costs a fault (ADR 37).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqarch.ops.dispatch.eager import is_batched, is_eager
from seqarch.ops.native.onednn import fastest_product

BLOCK = 2**20
"""Logits of a block of rows: 4 MB in float32."""


def serves(features: Tensor, weight: Tensor) -> bool:
    """Whether :func:`head_cross_entropy` computes the loss: on a CPU, in one of float32 and float64."""
    return (
        features.is_cpu
        and weight.is_cpu
        and features.dtype is weight.dtype
        and features.dtype in (torch.float32, torch.float64)
        and is_eager(features.device)
    )


def head_cross_entropy(features: Tensor, weight: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """The sum of ``-log softmax(weight features)[target]`` over the targets that are counted.

    One backward pass and no second derivative: the logits are gone after the first.

    Args:
        features: ``[M, D]``, where :func:`serves` says so.
        weight: ``[N, D]``.
        targets: int64 ``[M]``, from 0 to N - 1.
        counted: bool ``[M]``.
    """
    return _HeadCrossEntropy.apply(features, weight, targets, counted)  # type: ignore[return-value]


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        logits = fastest_product(features, weight)
        totals, chosen = logits.new_empty(len(logits)), logits.gather(1, targets[:, None])[:, 0]
        for total, rows in zip(*_blocks(totals, logits), strict=True):
            torch.logsumexp(rows, dim=1, out=total)
        ctx.save_for_backward(features, weight, targets, counted, logits, totals)
        ctx.spent = False
        return (totals - chosen).where(counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "LanguageModel.loss has first derivatives only; F.cross_entropy of the logits has others"
            )
        if ctx.spent:
            raise RuntimeError("LanguageModel.loss serves one backward pass; F.cross_entropy of the logits serves more")
        ctx.spent = True
        features, weight, targets, counted, logits, totals = ctx.saved_tensors
        times = torch.where(counted.any(), gradient, 0)  # of no targets at all, the mean's is infinite
        many = is_batched(gradient)  # is_grads_batched: the logits hold one gradient, all others are its multiples
        factors = torch.where(counted, torch.ones_like(totals) if many else times, 0)
        for rows, total, factor in zip(*_blocks(logits, totals[:, None], factors[:, None]), strict=True):
            rows.sub_(total).exp_().mul_(factor)
        logits.scatter_add_(1, targets[:, None], -factors[:, None])
        of_features, of_weight, *_ = ctx.needs_input_grad
        found = (
            fastest_product(logits, weight.t()) if of_features else None,
            # The transpose of this product with its factors turned would have oneDNN copy the logits.
            fastest_product(features.t(), logits.t()).t().contiguous() if of_weight else None,
        )
        return (*(times * each if many and each is not None else each for each in found), None, None)


def _blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each cut along its first dimension into the same blocks, of :data:`BLOCK` numbers of the widest."""
    widest = max(tensor.numel() // max(len(tensor), 1) for tensor in tensors)
    return [tensor.split(max(1, BLOCK // max(widest, 1))) for tensor in tensors]
