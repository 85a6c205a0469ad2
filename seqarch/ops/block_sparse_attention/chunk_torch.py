"""Some queries at a time: their keys and values are gathered, and the rest is small dense products.

The backward pass gathers again and computes the weights from the kept logarithms of the softmax's sums (Dao 2023,
"FlashAttention-2", section 3.1), so that memory is the inputs' and outputs' and one chunk's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from seqarch.ops.block_sparse_attention.inputs import BlockSparseAttentionInputs, ListInputs
from seqarch.ops.block_sparse_attention.lists import ListOperators, attend, hidden, rows, zero_outputs
from seqarch.ops.native.custom_op import Upstream, as_given

CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
"""Numbers gathered or scored at a time: on a CPU they should stay near a core's cache."""


class _Chunks:
    """Queries, all rows one after the other, cut so that what is gathered for a chunk is bounded."""

    def __init__(self, inputs: ListInputs):
        q, k, v, entries, block_size = inputs.q, inputs.k, inputs.v, inputs.lists, inputs.block_size
        batch, queries, heads = q.shape[:3]
        lists = entries.shape[2]
        self.entries, self.keys = entries.flatten(0, 1), k.shape[1]
        self.first = inputs.first.expand(batch, queries).reshape(-1, 1, 1)
        self.at = torch.arange(self.keys - queries, self.keys, device=q.device).repeat(batch)[:, None, None]
        self.row = torch.arange(batch, device=q.device).repeat_interleave(queries)[:, None, None]
        self.head = torch.arange(lists, device=q.device)[:, None] // (lists // k.shape[2])
        self.inside = torch.arange(block_size, device=q.device)
        gathered = entries.shape[3] * block_size * (q.shape[3] + v.shape[3] + heads // lists) * lists
        self.size = max(1, CHUNK_ELEMENTS.get(q.device.type, 2**22) // gathered)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of each chunk the queries, the entries of their lists per token ``[C, I, S b]``, and where the tokens are."""
        for start in range(0, len(self.entries), self.size):
            part = slice(start, start + self.size)
            entries = self.entries[part].unsqueeze(-1)
            times = self.first[part].unsqueeze(-1) + (entries >> 1) * len(self.inside) + self.inside
            yield part, entries.expand_as(times).flatten(2), times.flatten(2)

    def place(self, part: slice, times: Tensor, unseen: Tensor, steps: tuple[int, ...]) -> Tensor:
        """The rows of memory in which those tokens lie; the query's own for what it does not see, so that no number of
        another token is read, which may not be finite."""
        times = torch.where(unseen, self.at[part], times).clamp(0, self.keys - 1)
        return (self.row[part] * steps[0] + times * steps[1] + self.head * steps[2]).flatten()


def _by_lists(x: Tensor, count: int) -> Tensor:
    """``[B, T, H, ...]`` to ``[B T, I, H / I, ...]``."""
    return x.flatten(0, 1).unflatten(1, (count, -1))


def forward(inputs: ListInputs) -> tuple[Tensor, Tensor]:
    q, k, v, scale, window = inputs.q, inputs.k, inputs.v, inputs.scale, inputs.window
    o, log_sum = zero_outputs(inputs)
    if inputs.empty():
        return o, log_sum
    wide, count, chunks = log_sum.dtype, inputs.lists.shape[2], _Chunks(inputs)
    queries, o_lists, log_lists = _by_lists(q, count), _by_lists(o, count), _by_lists(log_sum, count)
    (key_rows, key_steps), (value_rows, value_steps) = rows(k), rows(v)
    for part, inside, times in chunks:
        unseen = hidden(inside, times, chunks.at[part], window)
        keys = key_rows.index_select(0, chunks.place(part, times, unseen, key_steps)).to(wide)
        scores = (queries[part].to(wide) * scale) @ keys.view(*times.shape, -1).mT
        scores.masked_fill_(unseen.unsqueeze(2), -torch.inf)
        largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True).clamp(min=1)  # it is 1 or more, or 0 where nothing is seen
        values = value_rows.index_select(0, chunks.place(part, times, unseen, value_steps)).to(wide)
        o_lists[part] = (weights @ values.view(*times.shape, -1) / total).to(o.dtype)
        log_lists[part] = (largest + total.log()).squeeze(-1)
    return o, log_sum


def backward(inputs: ListInputs, upstream: Upstream) -> list[Tensor]:
    q, k, v, scale, window = inputs.q, inputs.k, inputs.v, inputs.scale, inputs.window
    (o, log_sum), (do, *dlse) = upstream.kept, upstream.gradients
    wide, count = log_sum.dtype, inputs.lists.shape[2]
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    if inputs.empty():
        return as_given(inputs, (dq, dk, dv, None, None))
    chunks = _Chunks(inputs)
    queries, o, do, log_sum, *dlse = (_by_lists(x, count) for x in (q, o, do, log_sum, *dlse))
    dq_lists, (dk_rows, steps), (dv_rows, _) = _by_lists(dq, count), rows(dk), rows(dv)
    key_rows, value_rows = (rows(x.contiguous())[0] for x in (k, v))
    for part, inside, times in chunks:
        unseen = hidden(inside, times, chunks.at[part], window)
        place = chunks.place(part, times, unseen, steps)
        keys, values = (x.index_select(0, place).to(wide).view(*times.shape, -1) for x in (key_rows, value_rows))
        query, dout = queries[part].to(wide) * scale, do[part].to(wide)
        weights = (query @ keys.mT).sub_(log_sum[part].unsqueeze(-1))
        weights.masked_fill_(unseen.unsqueeze(2), -torch.inf).exp_()
        dv_rows.index_add_(0, place, (weights.mT @ dout).flatten(0, 2))
        own = (dout * o[part].to(wide)).sum(-1, keepdim=True)
        for each in dlse:
            own = own - each[part].unsqueeze(-1)
        dscores = (dout @ values.mT).sub_(own).mul_(weights)
        dq_lists[part] = dscores @ keys * scale
        dk_rows.index_add_(0, place, (dscores.mT @ query).flatten(0, 2))
    return as_given(inputs, (dq, dk, dv, None, None))


operators = ListOperators("block_sparse_attention_chunk", forward, backward)


def run(inputs: BlockSparseAttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    return attend(operators, inputs)
