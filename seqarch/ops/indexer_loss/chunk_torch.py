"""Some queries at a time: their scores with all keys up to the last of them, and the gradients with the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from seqarch.ops.chunked.queries import index_scores, query_chunks
from seqarch.ops.dispatch.eager import active_transform
from seqarch.ops.indexer_loss.inputs import IndexerLossInputs
from seqarch.ops.native.custom_op import Operator, Upstream

TRANSFORMABLE = True


def run(inputs: IndexerLossInputs) -> Tensor:
    if inputs.offsets is not None:
        return torch.cat([run(each) for each in inputs.sequences(inputs.offsets)])
    inputs = inputs.widened()
    return _operator(inputs)[0] if active_transform() is None else plain(inputs)


class _Compared(NamedTuple):
    """A chunk's queries and the tokens up to its last.

    Attributes:
        part, tokens: the queries, and how many tokens.
        products: ``[B, C, Hi, M]``, of index queries and index keys.
        log_guess: ``log softmax(I) [B, C, M]`` over the tokens that each query compares.
        target: p, their weights in the attention.
        loss: ``[B]``, the sum of the queries' divergences.
    """

    part: slice
    tokens: int
    products: Tensor
    log_guess: Tensor
    target: Tensor
    loss: Tensor


def _compare(inputs: IndexerLossInputs) -> Iterator[_Compared]:
    index_q = inputs.index_q
    q, k = inputs.q.to(index_q.dtype), inputs.k.to(index_q.dtype)
    before = k.shape[1] - q.shape[1]
    for part, tokens in query_chunks(q.shape[1], before):
        seen = _seen(inputs, part, tokens, before)
        scores, products = index_scores(index_q[:, part], inputs.index_k[:, :tokens], inputs.weight[:, part])
        log_guess = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
        target = _mean_weights(q[:, part] * inputs.scale, k[:, :tokens], seen)
        loss = (target.xlogy(target) - target * log_guess.masked_fill(~seen, 0)).sum((1, 2))
        yield _Compared(part, tokens, products, log_guess, target, loss)


def forward(inputs: IndexerLossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each row, and its gradients by the indexer's queries, keys and weights.

    The gradient by the scores is ``softmax(I) - p``, known as soon as the loss is: the others follow it, and the
    backward pass only scales them.
    """
    index_q, index_k, weight = inputs.index_q, inputs.index_k, inputs.weight
    loss = index_q.new_zeros(index_q.shape[0])
    dq, dk, dweight = (torch.zeros_like(x) for x in (index_q, index_k, weight))
    for chunk in _compare(inputs):
        part, products = chunk.part, chunk.products
        loss += chunk.loss
        keys, dscores = index_k[:, : chunk.tokens], (chunk.log_guess.exp() - chunk.target).unsqueeze(2)
        dweight[:, part] = (dscores @ products.relu().mT).squeeze(2)
        dproducts = (weight[:, part].unsqueeze(-1) * dscores * (products > 0)).flatten(1, 2)
        dq[:, part] = (dproducts @ keys).unflatten(1, products.shape[1:3])
        dk[:, : chunk.tokens] += dproducts.mT @ index_q[:, part].flatten(1, 2)
    return loss, dq, dk, dweight


def backward(inputs: IndexerLossInputs, upstream: Upstream) -> list[Tensor]:
    (dloss,) = upstream.gradients
    scaled = [dloss.view(-1, *[1] * (gradient.ndim - 1)) * gradient for gradient in upstream.kept]
    return scaled + _none(inputs)


def plain(inputs: IndexerLossInputs) -> Tensor:
    """The loss of each row, which torch differentiates in any way."""
    return torch.stack([inputs.zeros(), *(chunk.loss for chunk in _compare(inputs))]).sum(0)


def _none(inputs: IndexerLossInputs) -> list[Tensor]:
    """No gradient, as an operator returns it: of the attention's queries and keys, of lists and of starts."""
    return [torch.empty(0) for _ in inputs.tensor_fields()[3:]]


def _outputs(inputs: IndexerLossInputs) -> tuple[Tensor, ...]:
    indexer = inputs.index_q, inputs.index_k, inputs.weight
    return inputs.index_q.new_empty(len(inputs.index_q)), *(torch.empty_like(x) for x in indexer)


def _seen(inputs: IndexerLossInputs, part: slice, tokens: int, before: int) -> Tensor:
    """Which of the first ``tokens`` keys each query of a chunk compares: ``[1 or B, C, tokens]``.

    One that sees none is given one: a softmax over nothing is NaN, and over one token nothing diverges.
    """
    device, token_index = inputs.device, inputs.token_index
    at = torch.arange(before + part.start, before + part.stop, device=device)[:, None]
    start = torch.zeros(1, dtype=torch.int64, device=device) if inputs.key_start is None else inputs.key_start
    start = start[:, None, None]
    if token_index is None:
        key, start = torch.arange(tokens, device=device), start.clamp(max=max(0, tokens - 1))
        return (key <= at.maximum(start)) & (key >= start)
    place = token_index[:, part] + start
    hidden = (token_index[:, part] < 0) | (place > at)
    spare = tokens * (~hidden).any(-1, keepdim=True)  # beyond all keys, but for a query that sees none the first
    place = torch.cat([place.masked_fill(hidden, tokens), spare], dim=-1)
    listed = torch.zeros(*place.shape[:2], tokens + 1, dtype=torch.bool, device=device)
    return listed.scatter(-1, place, True)[..., :tokens]


def _mean_weights(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Softmax weights ``[B, C, M]`` of a chunk's scaled queries over the keys that they see, the heads' mean."""
    queries = rearrange(q, "b t (g r) k -> b g (t r) k", g=k.shape[2])
    scores = rearrange(queries @ rearrange(k, "b s g k -> b g k s"), "b g (t r) s -> b t (g r) s", t=q.shape[1])
    return scores.masked_fill(~seen.unsqueeze(2), -torch.inf).softmax(-1).mean(2)


_operator = Operator(
    *("indexer_loss", IndexerLossInputs, forward, backward, plain, _outputs),
    gradients=lambda inputs, upstream: [*(torch.empty_like(x) for x in upstream.kept), *_none(inputs)],
    keeps=(1, 2, 3),
)
