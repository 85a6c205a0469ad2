"""The reference: one query at a time, over the keys that it sees and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.attention.scores import capped
from seqarch.ops.chunked.packing import split_sequences
from seqarch.ops.dispatch.checks import accumulation_dtype

TRANSFORMABLE = True


def run(inputs: AttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    wide = accumulation_dtype(inputs.q, inputs.k, inputs.v)
    q, k, v = inputs.q.to(wide), inputs.k.to(wide), inputs.v.to(wide)
    if inputs.offsets is not None:
        sequences = split_sequences(inputs.offsets, q, k, v)
        o, lse = _joined([_attend(inputs, q, k, v, 0) for q, k, v in sequences], dim=1)
    elif inputs.key_start is not None and len(q):
        rows = zip(q.split(1), k.split(1), v.split(1), inputs.key_start.tolist(), strict=True)
        o, lse = _joined([_attend(inputs, *row) for row in rows], dim=0)
    else:
        o, lse = _attend(inputs, q, k, v, 0)
    o = o.to(inputs.v.dtype)
    return (o, lse) if inputs.return_lse else o


def _joined(parts: list[tuple[Tensor, Tensor]], dim: int) -> list[Tensor]:
    return [torch.cat(each, dim=dim) for each in zip(*parts, strict=True)]


def _attend(inputs: AttentionInputs, q: Tensor, k: Tensor, v: Tensor, first_key: int) -> tuple[Tensor, Tensor]:
    """Sequences of one length, each with a row of its own, whose keys begin at ``first_key``: the outputs, and the
    logarithms of the softmax's sums, -inf where nothing is seen."""
    queries, (keys, groups) = q.shape[1], k.shape[1:3]
    if not queries:
        nothing = 0 * (q.sum() + k.sum() + v.sum())  # gradients are defined: zeros
        return nothing.expand(*q.shape[:3], v.shape[3]), nothing.expand(q.shape[:3])
    q = q.unflatten(2, (groups, q.shape[2] // groups)) * inputs.scale  # [B, Tq, G, H / G, K]
    k, v = k.permute(0, 2, 3, 1), v.transpose(1, 2)  # [B, G, K, Tk], [B, G, Tk, V]
    outputs, sums = [], []
    for i in range(queries):
        end = max(0, i + keys - queries + 1) if inputs.causal else keys
        start = max(0, first_key, end - inputs.window if inputs.window else 0)
        seen = slice(min(start, end), end)
        scores = capped(q[:, i] @ k[..., seen], inputs.logit_cap)
        outputs.append((scores.softmax(dim=-1) @ v[:, :, seen]).flatten(1, 2))
        sums.append(scores.logsumexp(dim=-1).flatten(1, 2))
    return torch.stack(outputs, dim=1), torch.stack(sums, dim=1)
