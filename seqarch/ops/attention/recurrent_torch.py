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
    q, k, v, bias = inputs.q.to(wide), inputs.k.to(wide), inputs.v.to(wide), inputs.key_bias
    if inputs.offsets is not None:
        sequences = split_sequences(inputs.offsets, q, k, v, bias)
        o, lse = _joined([_attend(inputs, q, k, v, bias, 0) for q, k, v, bias in sequences], dim=1)
    elif inputs.key_start is not None and len(q):
        biases = [None] * len(q) if bias is None else bias.split(1)
        rows = zip(q.split(1), k.split(1), v.split(1), biases, inputs.key_start.tolist(), strict=True)
        o, lse = _joined([_attend(inputs, *row) for row in rows], dim=0)
    else:
        o, lse = _attend(inputs, q, k, v, bias, 0)
    o = o.to(inputs.v.dtype)
    return (o, lse) if inputs.return_lse else o


def _joined(parts: list[tuple[Tensor, Tensor]], dim: int) -> list[Tensor]:
    return [torch.cat(each, dim=dim) for each in zip(*parts, strict=True)]


def _attend(
    inputs: AttentionInputs, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first_key: int
) -> tuple[Tensor, Tensor]:
    """Sequences of one length, each with a row of its own, whose keys begin at ``first_key``: the outputs, and the
    logarithms of the softmax's sums, -inf where nothing is seen."""
    queries, (keys, groups) = q.shape[1], k.shape[1:3]
    if not queries:
        given = [x.sum() for x in (q, k, v, bias) if x is not None]
        nothing = 0 * torch.stack(given).sum()  # gradients are defined: zeros
        return nothing.expand(*q.shape[:3], v.shape[3]), nothing.expand(q.shape[:3])
    q = q.unflatten(2, (groups, q.shape[2] // groups)) * inputs.scale  # [B, Tq, G, H / G, K]
    k, v = k.permute(0, 2, 3, 1), v.transpose(1, 2)  # [B, G, K, Tk], [B, G, Tk, V]
    added = None if bias is None else bias.transpose(1, 2).unflatten(1, (groups, -1))  # [B, G, H / G, Tk]
    outputs, sums = [], []
    for i in range(queries):
        end = max(0, i + keys - queries + 1) if inputs.causal else keys
        start = max(0, first_key, end - inputs.window if inputs.window else 0)
        seen = slice(min(start, end), end)
        scores = capped(q[:, i] @ k[..., seen], inputs.logit_cap)
        scores = scores if added is None else scores + added[..., seen]
        outputs.append((scores.softmax(dim=-1) @ v[:, :, seen]).flatten(1, 2))
        sums.append(scores.logsumexp(dim=-1).flatten(1, 2))
    return torch.stack(outputs, dim=1), torch.stack(sums, dim=1)
