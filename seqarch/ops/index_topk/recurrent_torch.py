"""The reference: one query at a time, over the tokens that it sees."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.index_topk.inputs import IndexTopKInputs

TRANSFORMABLE = True


def run(inputs: IndexTopKInputs) -> Tensor:
    if inputs.offsets is not None:
        return torch.cat([run(each) for each in inputs.sequences(inputs.offsets)], dim=1)
    tensors, top_k = (inputs.q, inputs.k, inputs.weight), inputs.top_k
    wide = accumulation_dtype(*tensors)
    q, k, weight = (x.detach().to(wide) for x in tensors)
    starts = [0] * len(q) if inputs.key_start is None else inputs.key_start.tolist()
    before = k.shape[1] - q.shape[1]
    lists = []
    for row, first in enumerate(starts):
        for i in range(q.shape[1]):
            keys = k[row, first : max(first, before + i + 1)]  # [n, K], the tokens up to its own
            scores = weight[row, i] @ (q[row, i] @ keys.T).relu()
            index = scores.sort(descending=True, stable=True).indices[:top_k]
            lists.append(F.pad(index, (0, top_k - len(index)), value=-1))
    nothing = torch.empty(0, top_k, dtype=torch.int64, device=q.device)
    return torch.stack(lists or [nothing]).view(*q.shape[:2], top_k)
