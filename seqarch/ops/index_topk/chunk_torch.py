"""Some queries at a time: their scores with all keys up to the last of them, sorted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.chunked.queries import index_scores, largest, query_chunks, whole
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.index_topk.inputs import IndexTopKInputs
from seqarch.ops.native.custom_op import Operator, empty_gradients

TRANSFORMABLE = True


def run(inputs: IndexTopKInputs) -> Tensor:
    if inputs.offsets is not None:
        return torch.cat([run(each) for each in inputs.sequences(inputs.offsets)], dim=1)
    wide = accumulation_dtype(inputs.q, inputs.k, inputs.weight)
    q, k, weight = (x.detach().to(wide) for x in (inputs.q, inputs.k, inputs.weight))
    return _choose(inputs.replace(q=q, k=k, weight=weight))


def choose(inputs: IndexTopKInputs) -> Tensor:
    """The lists ``[B, Tq, top_k]``."""
    q, k, key_start, top_k = inputs.q, inputs.k, inputs.key_start, inputs.top_k
    before = k.shape[1] - q.shape[1]
    chosen = [torch.empty(q.shape[0], 0, top_k, dtype=torch.int64, device=q.device)]
    for part, tokens in query_chunks(q.shape[1], before):
        scores, _ = index_scores(q[:, part], k[:, :tokens], inputs.weight[:, part])
        seen = _visible(part, tokens, before, key_start, q.device).expand_as(scores)
        best = largest(scores.masked_fill(~seen, -torch.inf), top_k)
        listed = best if key_start is None else best - key_start[:, None, None]
        listed = listed.masked_fill(~seen.gather(-1, best), -1)
        chosen.append(F.pad(listed, (0, top_k - best.shape[-1]), value=-1))
    return torch.cat(chosen, dim=1)


def _visible(part: slice, tokens: int, before: int, key_start: Tensor | None, device: torch.device) -> Tensor:
    """Which of the first ``tokens`` keys each query of a chunk sees: ``[1 or B, C, tokens]``."""
    key = torch.arange(tokens, device=device)
    seen = key <= torch.arange(before + part.start, before + part.stop, device=device)[:, None]
    return seen[None] if key_start is None else seen & (key >= key_start[:, None, None])


def _empty_lists(inputs: IndexTopKInputs) -> Tensor:
    return inputs.q.new_empty(*inputs.q.shape[:2], inputs.top_k, dtype=torch.int64)


# of its outputs none has a gradient, so that no backward pass is ever run
_operator = Operator("index_topk", IndexTopKInputs, choose, empty_gradients, choose, _empty_lists, results=0)
_choose = whole(_operator, choose, choose)
