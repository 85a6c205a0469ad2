"""128 queries at a time over the keys before them: the logarithms of what is left are sums from the last key on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.chunked.packing import split_sequences
from seqarch.ops.chunked.queries import query_chunks
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.stick_breaking_attention.inputs import StickBreakingInputs

TRANSFORMABLE = True


def run(inputs: StickBreakingInputs) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(inputs.q, inputs.k, inputs.v)
    q, k, v = inputs.q.to(wide) * inputs.scale, inputs.k.to(wide), inputs.v.to(wide)
    if inputs.offsets is None:
        o, rest = _attend(q, k, v, inputs.key_start)
    else:
        parts = [_attend(q, k, v, None) for q, k, v in split_sequences(inputs.offsets, q, k, v)]
        o, rest = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return o.to(inputs.v.dtype), rest


def _attend(q: Tensor, k: Tensor, v: Tensor, key_start: Tensor | None) -> tuple[Tensor, Tensor]:
    before, groups = k.shape[1] - q.shape[1], k.shape[2]
    q = q.transpose(1, 2).unflatten(1, (groups, q.shape[2] // groups))  # [B, G, H / G, Tq, K]
    k, v = (x.transpose(1, 2).unsqueeze(2) for x in (k, v))
    outputs, rests = [q[..., :0, :] @ k[..., :0, :].mT @ v[..., :0, :]], [q[..., :0, 0]]
    for rows, end in query_chunks(q.shape[3], before):
        key = torch.arange(end, device=q.device)
        seen = key < torch.arange(before + rows.start, before + rows.stop, device=q.device).unsqueeze(1)
        if key_start is not None:
            seen = seen & (key >= key_start[:, None, None, None, None])
        scores = (q[..., rows, :] @ k[..., :end, :].mT).masked_fill(~seen, -torch.inf)
        # log(1 - sigmoid(z)) of a key and those after it
        left = F.logsigmoid(-scores).flip(-1).cumsum(-1).flip(-1)
        later = F.pad(left[..., 1:], (0, 1))  # of the keys after it, without subtracting large numbers
        outputs.append((F.logsigmoid(scores) + later).exp() @ v[..., :end, :])
        rests.append(left[..., 0].exp())
    o, rest = torch.cat(outputs, dim=3), torch.cat(rests, dim=3)
    return o.flatten(1, 2).transpose(1, 2), rest.flatten(1, 2).transpose(1, 2)
