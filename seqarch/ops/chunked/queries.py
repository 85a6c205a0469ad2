"""Some queries at a time, so that no tensor holds all pairs of queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.dispatch.eager import active_transform

QUERIES = 128
"""Queries of a chunk: its scores take the memory of the queries themselves times ``128 / K`` and the share of keys."""


def query_chunks(queries: int, before: int) -> Iterator[tuple[slice, int]]:
    """Chunks of so many queries that ``before`` tokens precede, each with the tokens up to its last query."""
    for start in range(0, queries, QUERIES):
        stop = min(start + QUERIES, queries)
        yield slice(start, stop), max(0, before + stop)


def largest(scores: Tensor, count: int) -> Tensor:
    """The places of the ``count`` largest along the last axis, the largest first, equal ones from the lowest place on.

    ``topk`` breaks ties as it likes, so that a step could choose otherwise than the whole sequence did.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def index_scores(q: Tensor, k: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The lightning indexer's scores of a chunk's queries, ``[B, C, M]``, and what they sum, ``[B, C, H, M]``."""
    products = (q.flatten(1, 2) @ k.mT).unflatten(1, q.shape[1:3])
    return (weight.unsqueeze(2) @ products.relu()).squeeze(2), products


def whole(operator: Callable[..., Any], compute: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A loop over chunks as the custom operator that was made of it, which differentiates it and compilers leave whole.

    Where neither is asked for, the function is called as it is, and what counts FLOPs sees its products. ``plain`` is
    the same by functions that torch's transforms go through.
    """

    def call(inputs: Any) -> Any:
        if active_transform() is not None:
            return plain(inputs)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return operator(inputs)
        return compute(inputs)

    return call
