"""128 queries at a time: products within a chunk by one triangular solve, then all earlier keys times the chunk's."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.queries import query_chunks
from seqarch.ops.chunked.softmax import masked_softmax
from seqarch.ops.path_attention.inputs import PathAttentionInputs
from seqarch.ops.path_attention.sequences import over_sequences

TRANSFORMABLE = True


def run(inputs: PathAttentionInputs) -> tuple[Tensor, Tensor]:
    return over_sequences(_attend, inputs)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, bias: Tensor | None, key_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    before, groups, width = k.shape[1] - q.shape[1], k.shape[2], k.shape[3]
    q = q.transpose(1, 2).unflatten(1, (groups, q.shape[2] // groups))  # [B, G, H / G, Tq, K]
    k, v, w = (x.transpose(1, 2) for x in (k, v, w))  # [B, G, T, K]
    written = beta.transpose(1, 2).unsqueeze(-1) * w
    added = None if bias is None else bias.transpose(1, 2).unflatten(1, (groups, -1)).unsqueeze(-2)
    keys, outputs = k[:, :, :before], [q[..., :0, :] @ k[:, :, None, :0].mT @ v[:, :, None, :0]]
    for rows, end in query_chunks(q.shape[3], before):
        own_w, own_written, own_q = w[:, :, rows], written[:, :, rows], q[..., rows, :]
        own_k = k[:, :, before + rows.start : before + rows.stop]
        # H_t ... H_1 = I - sum_{i <= t} w_i u_i^T with u_i = beta_i (w_i - sum_{l < i} (w_i . w_l) u_l), and what
        # u's of the factors after key j alone give of k_j: the same triangular system for both
        right = torch.cat([own_written, (own_written @ own_k.mT).tril(-1)], dim=-1)
        solved = torch.linalg.solve_triangular(
            (own_written @ own_w.mT).tril(-1), right, upper=False, unitriangular=True
        )
        u, of_keys = solved[..., :width], solved[..., width:]
        along = (own_q @ own_w.mT.unsqueeze(2)).tril()
        far = (own_q - along @ u.unsqueeze(2)) @ keys.mT.unsqueeze(2)
        near = own_q @ own_k.mT.unsqueeze(2) - along @ of_keys.unsqueeze(2)
        scores = torch.cat([far, near], dim=-1)
        if added is not None:
            scores = scores + added[..., :end]
        key = torch.arange(end, device=q.device)
        seen = key <= torch.arange(before + rows.start, before + rows.stop, device=q.device).unsqueeze(1)
        if key_start is not None:
            seen = seen & (key >= key_start[:, None, None, None, None])
        outputs.append(masked_softmax(scores, seen) @ v[:, :, None, :end])
        earlier = keys - (keys @ u.mT) @ own_w
        keys = torch.cat([earlier, own_k - of_keys.mT @ own_w], dim=2)
    o = torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2)
    return o, keys.transpose(1, 2)
