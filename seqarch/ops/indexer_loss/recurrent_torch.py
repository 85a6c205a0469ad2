"""The reference: one query at a time, over the tokens of its list."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.dispatch.eager import is_batched
from seqarch.ops.indexer_loss.inputs import IndexerLossInputs

TRANSFORMABLE = True


def unsupported(inputs: IndexerLossInputs) -> str | None:
    if inputs.token_index is not None and is_batched(inputs.token_index):
        return "token_index is batched by vmap, and its values are asked for"
    return None


def run(inputs: IndexerLossInputs) -> Tensor:
    if inputs.offsets is not None:
        return torch.cat([run(each) for each in inputs.sequences(inputs.offsets)])
    inputs = inputs.widened()
    index_q, index_k, weight = inputs.index_q, inputs.index_k, inputs.weight
    q, k, nothing = inputs.q.to(weight.dtype), inputs.k.to(weight.dtype), inputs.zeros()
    groups, before = k.shape[2], k.shape[1] - q.shape[1]
    losses = []
    for row in range(len(q)):
        divergences = [nothing[row]]  # keeps the gradients defined: zeros
        for i in range(q.shape[1]):
            seen = _seen(inputs, row, i, before)
            scores = weight[row, i] @ (index_q[row, i] @ index_k[row, seen].T).relu()
            log_guess = scores.log_softmax(-1)
            heads = (q[row, i] * inputs.scale).unflatten(0, (groups, -1)).unbind()
            p = torch.cat([(heads[g] @ k[row, seen, g].T).softmax(-1) for g in range(groups)]).mean(0)
            divergences.append((p.xlogy(p) - p * log_guess).sum())
        losses.append(torch.stack(divergences).sum())
    return torch.stack(losses) if losses else nothing


def _seen(inputs: IndexerLossInputs, row: int, i: int, before: int) -> Tensor:
    """The places in k of the tokens that query i of a row compares: ``[tokens]``, int64."""
    first = 0 if inputs.key_start is None else int(inputs.key_start[row])
    tokens = range(max(0, before + i + 1 - first))
    if inputs.token_index is not None:
        tokens = sorted({token for token in inputs.token_index[row, i].tolist() if token in tokens})
    return torch.tensor(tokens, dtype=torch.int64, device=inputs.k.device) + first
