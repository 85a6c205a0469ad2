"""Chunks of 64 tokens: pairs within a chunk by matrix products, and a counter of the states of chunks (Guo et al. 2025,
section 3.2 and 3.4).

Within a chunk that starts from states S, outputs are ``(M o Lambda) V`` and, of each state, ``lambda R S``: M are the
weights of the base recurrence, Lambda those of the level at which each pair meets, R what the queries are to the
chunk's start. A chunk adds ``W V`` to the states, which pass it by ``decay S - E S``. With beta, M, R, W and E follow
from the triangular system of the delta rule, solved for all values at once (Yang et al. 2024, "Parallelizing Linear
Transformers with the Delta Rule", section 3); without it E is 0. A row whose first token is no multiple of 64 begins
with tokens that change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.chunked.decay import Decay, chunk_decay, chunk_heads, join_heads
from seqarch.ops.chunked.packing import Chunks
from seqarch.ops.log_linear_attention import recurrent_torch
from seqarch.ops.log_linear_attention.inputs import LogLinearAttentionInputs
from seqarch.ops.log_linear_attention.levels import as_slots, bits, carried, over_rows, start_of

TRANSFORMABLE = True
CHUNK = 64
WITHIN = CHUNK.bit_length() - 1
"""Bits of a count that a chunk's tokens change; each further bit is a state of whole chunks."""


class Maps(NamedTuple):
    """What the base recurrence does in each chunk, all ``[B, N, G, R, ...]``, with 1 for R where heads share it.

    Attributes:
        mixing: M ``[C, C]``, the weights of the chunk's values in its outputs.
        queries, since: R, what each query is to the chunk's start: ``[C, K]`` times ``[C, 1]``.
        write: W ``[K, C]``.
        over: how a state passes chunk n.
    """

    mixing: Tensor
    queries: Tensor
    since: Tensor
    write: Tensor
    over: Callable[[int, Tensor], Tensor]


def run(inputs: LogLinearAttentionInputs) -> tuple[Tensor, Tensor]:
    return over_rows(_rows, inputs)


def _rows(inputs: LogLinearAttentionInputs) -> tuple[Tensor, Tensor]:
    if not inputs.length:
        return recurrent_torch.run(inputs)
    batch, length, groups, _ = inputs.q.shape
    dtype, first = inputs.state.dtype, inputs.before[0] if inputs.before else 0
    lead, after = first % CHUNK, first + length
    chunks = Chunks(batch, lead + length, CHUNK, None, inputs.device)

    def heads(x: Tensor) -> Tensor:
        return chunk_heads(_after_nothing(x, lead), chunks, groups, dtype)

    log_decay = None if inputs.log_decay is None else _after_nothing(inputs.log_decay, lead)
    decay = chunk_decay(log_decay, chunks, groups, dtype)
    beta = None if inputs.beta is None else heads(inputs.beta.unsqueeze(-1))
    maps = _maps(inputs.scale * heads(inputs.q), heads(inputs.k), beta, decay)
    v, weight = heads(inputs.v), heads(inputs.level_weight)
    o, written = (maps.mixing * _of_pairs(weight)) @ v, (maps.write @ v).unbind(1)

    held = inputs.state.unflatten(1, (groups, -1))  # [B, G, R, L - 1, K, V]
    # what is read of states: by each, the chunks whose queries see it, and the weights with which they do
    begun = {place: held[..., place, :, :] for place in bits(lead)}
    reads = [([0], [state], _of_begun(weight[:, :1], lead, place)) for place, state in begun.items()]
    states = {place: held[..., place, :, :] for place in bits(first) if place >= WITHIN}
    seen: dict[int, tuple[list[int], list[Tensor]]] = {}
    for n in range(chunks.count):
        for place, state in states.items():
            numbers, found = seen.setdefault(place, ([], []))
            numbers.append(n)
            found.append(state)
        states = {place: maps.over(n, state) for place, state in states.items()}
        if n + 1 < chunks.count or after % CHUNK == 0:
            own = sum((maps.over(0, state) for state in begun.values()), written[0]) if n == 0 else written[n]
            carried(states, own, WITHIN)
    reads += [(*found, weight[:, found[0], ..., place + 1 : place + 2]) for place, found in seen.items()]
    if reads:
        added = [_read(maps, numbers, torch.stack(found, dim=1), weights) for numbers, found, weights in reads]
        numbers = torch.tensor([n for each, *_ in reads for n in each], device=o.device)
        o = o.index_add(1, numbers, torch.cat(added, dim=1))
    for place in bits(after % CHUNK):
        start = start_of(after % CHUNK, place)
        span = slice(start, start + (1 << place))
        states[place] = maps.write[:, -1, ..., span] @ v[:, -1, ..., span, :]
        if chunks.count == 1:
            inside = [maps.over(0, state) for bit, state in begun.items() if start <= start_of(lead, bit) < span.stop]
            states[place] = sum(inside, states[place])
    o = join_heads(o, chunks)[:, lead:]
    return o.to(inputs.v.dtype), as_slots(states, held, 3).flatten(1, 2)


def _after_nothing(x: Tensor, tokens: int) -> Tensor:
    """``[B, T, ...]`` after so many tokens of zeros."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (tokens, 0)) if tokens else x


def _maps(q: Tensor, k: Tensor, beta: Tensor | None, decay: Decay) -> Maps:
    scores, ends, since = decay.scores(q, k), decay.to_end(k).mT, decay.from_start(torch.ones_like(q[..., :1]))
    if beta is None:
        return Maps(scores, q, since, ends, decay.over)
    solved = unit_inverse(beta * decay.scores(k, k).tril(-1)) * beta.mT
    recall = solved @ decay.from_start(k)
    erased = (ends @ recall).unbind(1)

    def over(chunk: int, state: Tensor) -> Tensor:
        return decay.over(chunk, state) - erased[chunk] @ state

    return Maps(scores @ solved, since * q - scores @ recall, torch.ones_like(since), ends @ solved, over)


def unit_inverse(below: Tensor) -> Tensor:
    """The inverse of ``1 + below``, ``[..., C, C]`` with numbers below the diagonal alone, C a power of two.

    Block by block, ``[[X, 0], [-Y B X, Y]]`` from the inverses X and Y of the halves: products of many small matrices
    at once, where a solver takes one after another.
    """
    size = below.shape[-1]
    inverse = torch.ones_like(below[..., :1]).unsqueeze(-1)  # [..., blocks, 1, 1]
    step = 1
    while step < size:
        blocks = below.unflatten(-1, (-1, 2 * step)).unflatten(-3, (-1, 2 * step))  # [..., n, 2 s, n, 2 s]
        corner = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., step:, :step]
        upper, lower = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        joined = _product(lower, _product(corner, upper))
        inverse = torch.cat(
            [torch.cat([upper, torch.zeros_like(upper)], dim=-1), torch.cat([-joined, lower], dim=-1)], dim=-2
        )
        step *= 2
    return inverse.squeeze(-3)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, of tiny matrices number by number."""
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2) if a.shape[-1] < 8 else a @ b


def _read(maps: Maps, numbers: list[int], states: Tensor, weights: Tensor) -> Tensor:
    """What the queries of these chunks read of a state each, ``[B, n, G, R, C, V]``."""
    queries, heads = maps.queries[:, numbers], states.shape[3]
    if queries.shape[3] == heads:
        found = queries @ states
    else:  # queries that heads share meet the states of all heads in one product
        side_by_side = states.transpose(3, 4).flatten(4, 5)
        found = (queries.squeeze(3) @ side_by_side).unflatten(-1, (heads, -1)).transpose(3, 4)
    return weights * maps.since[:, numbers] * found


def _of_pairs(weight: Tensor) -> Tensor:
    """The weight ``[..., C, C]`` of the level at which each pair of a chunk's tokens meets, from ``[..., C, L]``."""
    tokens = torch.arange(CHUNK, device=weight.device)
    return weight.gather(-1, _levels(tokens.unsqueeze(1) ^ tokens, weight).expand(*weight.shape[:-1], CHUNK))


def _levels(apart: Tensor, weight: Tensor) -> Tensor:
    """The bits of numbers; where there are no such levels no tokens are either, and any level will do."""
    count = (apart.unsqueeze(-1) >> torch.arange(WITHIN, device=apart.device) > 0).sum(-1)
    return count.clamp(max=weight.shape[-1] - 1)


def _of_begun(weight: Tensor, lead: int, place: int) -> Tensor:
    """The weight of the tokens of the first chunk before the call that a bit of their count stands for."""
    tokens = torch.arange(CHUNK, device=weight.device)
    level = _levels(tokens ^ start_of(lead, place), weight).unsqueeze(-1)
    return weight.gather(-1, level.expand(*weight.shape[:-1], 1))
