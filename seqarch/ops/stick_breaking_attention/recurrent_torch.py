"""The reference: one query at a time over the keys that it sees, with the products as they are written."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import split_sequences
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.stick_breaking_attention.inputs import StickBreakingInputs

TRANSFORMABLE = True


def run(inputs: StickBreakingInputs) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(inputs.q, inputs.k, inputs.v)
    q, k, v = inputs.q.to(wide) * inputs.scale, inputs.k.to(wide), inputs.v.to(wide)
    if inputs.offsets is not None:
        parts = [_attend(q, k, v, 0) for q, k, v in split_sequences(inputs.offsets, q, k, v)]
        o, rest = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    elif inputs.key_start is not None and len(q):
        rows = zip(q.split(1), k.split(1), v.split(1), inputs.key_start.tolist(), strict=True)
        o, rest = (torch.cat(each) for each in zip(*(_attend(*row) for row in rows), strict=True))
    else:
        o, rest = _attend(q, k, v, 0)
    return o.to(inputs.v.dtype), rest


def _attend(q: Tensor, k: Tensor, v: Tensor, first_key: int) -> tuple[Tensor, Tensor]:
    """Sequences of one length, each with a row of its own, whose keys begin at ``first_key``."""
    queries, (keys, groups) = q.shape[1], k.shape[1:3]
    if not queries:
        nothing = 0 * (q.sum() + k.sum() + v.sum())  # gradients are defined: zeros
        return nothing.expand(*q.shape[:3], v.shape[3]), nothing.expand(q.shape[:3])
    q = q.unflatten(2, (groups, q.shape[2] // groups))  # [B, Tq, G, H / G, K]
    k, v = k.permute(0, 2, 3, 1), v.transpose(1, 2)  # [B, G, K, Tk], [B, G, Tk, V]
    outputs, rests = [], []
    for i in range(queries):
        own = i + keys - queries
        seen = slice(min(max(0, first_key), own), own)
        share = (q[:, i] @ k[..., seen]).sigmoid()
        # what is left by a key and those after it; what a key finds is that of the key after it, of the last one all
        left = (1 - share).flip(-1).cumprod(-1).flip(-1)
        found = torch.cat([left[..., 1:], torch.ones_like(left[..., :1])], dim=-1)
        outputs.append(((share * found) @ v[:, :, seen]).flatten(1, 2))
        rests.append((1 - share).prod(-1).flatten(1, 2))
    return torch.stack(outputs, dim=1), torch.stack(rests, dim=1)
