"""The reference: one query at a time, over the keys that it sees and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from seqarch.ops.chunked.packing import each_sequence
from seqarch.ops.dispatch.checks import accumulation_dtype

TRANSFORMABLE = True


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    offsets: tuple[int, ...] | None,
    key_start: Tensor | None,
) -> Tensor:
    wide = accumulation_dtype(q, k, v)

    def rows(q: Tensor, k: Tensor, v: Tensor, first_key: int = 0) -> Tensor:
        q = q.unflatten(2, (k.shape[2], q.shape[2] // k.shape[2])) * scale  # [B, Tq, G, H / G, K]
        k, v = k.permute(0, 2, 3, 1), v.transpose(1, 2)  # [B, G, K, Tk], [B, G, Tk, V]
        outputs = []
        for i in range(q.shape[1]):
            end = max(0, i + k.shape[-1] - q.shape[1] + 1) if causal else k.shape[-1]
            start = max(0, first_key, 0 if window is None else end - window)
            seen = slice(min(start, end), end)
            weights = (q[:, i] @ k[..., seen]).softmax(dim=-1)
            outputs.append((weights @ v[:, :, seen]).flatten(1, 2))
        return torch.stack(outputs, dim=1)

    def all_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.shape[0] * q.shape[1]:
            nothing = 0 * (q.sum() + k.sum() + v.sum())  # keeps the gradients defined: zeros
            return nothing.expand(*q.shape[:3], v.shape[3])
        if key_start is None:
            return rows(q, k, v)
        each = zip(q.split(1), k.split(1), v.split(1), key_start.tolist(), strict=True)
        return torch.cat([rows(*row) for row in each])

    return each_sequence(all_rows, offsets, q.to(wide), k.to(wide), v.to(wide)).to(v.dtype)
