"""Chunks of 32 tokens: matrix products inside a chunk, one state update per chunk (Yang et al. 2023, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.decay import chunk_decay, chunk_heads, join_heads
from seqarch.ops.chunked.packing import Chunks
from seqarch.ops.linear_attention.inputs import LinearAttentionInputs

TRANSFORMABLE = True
CHUNK = 32


def run(inputs: LinearAttentionInputs) -> tuple[Tensor, Tensor]:
    q, k, v, state = inputs.q, inputs.k, inputs.v, inputs.state
    batch, length, groups, _ = q.shape
    chunks = Chunks(batch, length, CHUNK, inputs.offsets, q.device)
    decay = chunk_decay(inputs.log_decay, chunks, groups, state.dtype)
    qc, kc, vc = (chunk_heads(x, chunks, groups, state.dtype) for x in (q, k, v))
    qc = qc * inputs.scale
    writes = (decay.to_end(kc).mT @ vc).unbind(1)
    state = state.unflatten(1, (groups, -1))
    before: list[Tensor] = [torch.zeros_like(writes[0])] * chunks.count
    last = []
    for rows, members in chunks.segments:
        carried = state[rows]
        for n in members:
            before[n] = carried
            carried = decay.over(n, carried) + writes[n]
        last.append(carried)
    o = decay.scores(qc, kc) @ vc + decay.from_start(qc) @ torch.stack(before, dim=1)
    return join_heads(o, chunks).to(v.dtype), torch.cat(last).flatten(1, 2)
