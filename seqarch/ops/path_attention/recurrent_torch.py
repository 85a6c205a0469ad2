"""The reference: token by token, all earlier keys are multiplied by the token's matrix, then read."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.softmax import masked_softmax
from seqarch.ops.path_attention.inputs import PathAttentionInputs
from seqarch.ops.path_attention.sequences import over_sequences

TRANSFORMABLE = True


def run(inputs: PathAttentionInputs) -> tuple[Tensor, Tensor]:
    return over_sequences(_attend, inputs)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, bias: Tensor | None, key_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    queries, groups, before = q.shape[1], k.shape[2], k.shape[1] - q.shape[1]
    q = q.unflatten(2, (groups, q.shape[2] // groups))  # [B, Tq, G, H / G, K]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, G, Tk, K], [B, G, Tk, V]
    added = None if bias is None else bias.transpose(1, 2).unflatten(1, (groups, -1))  # [B, G, H / G, Tk]
    seen = None
    if key_start is not None:
        seen = (torch.arange(k.shape[2], device=k.device) >= key_start[:, None])[:, None, None]
    keys, outputs = k[:, :, :before], [q[:, :0] @ k[:, :, :0].mT.unsqueeze(1) @ v[:, :, :0].unsqueeze(1)]
    for i in range(queries):
        own, end = w[:, i].unsqueeze(-2), before + i + 1
        keys = keys - (keys @ own.mT) @ (beta[:, i, :, None, None] * own)
        keys = torch.cat([keys, k[:, :, end - 1 : end]], dim=2)
        scores = q[:, i] @ keys.mT
        scores = scores if added is None else scores + added[..., :end]
        weights = scores.softmax(-1) if seen is None else masked_softmax(scores, seen[..., :end])
        outputs.append((weights @ v[:, :, :end]).unsqueeze(1))
    return torch.cat(outputs, dim=1).flatten(2, 3), keys.transpose(1, 2)
