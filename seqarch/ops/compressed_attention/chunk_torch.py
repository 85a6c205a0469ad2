"""Some queries at a time: dense products with all blocks that the last of them sees, and again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from seqarch.ops.chunked.queries import query_chunks, whole
from seqarch.ops.compressed_attention.blocks import Blocks, importance, select_blocks
from seqarch.ops.compressed_attention.inputs import CompressedAttentionInputs
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.native.custom_op import Operator, Upstream

TRANSFORMABLE = True


def run(inputs: CompressedAttentionInputs) -> tuple[Tensor, Tensor]:
    return _attend(inputs) if inputs.offsets is None else inputs.each_sequence(run, inputs.offsets)


def forward(inputs: CompressedAttentionInputs) -> tuple[Tensor, Tensor]:
    o, index = _empty_outputs(inputs)
    for part, read, chosen in _parts(inputs):
        o[:, part], index[:, part] = read, chosen
    return o, index


def plain(inputs: CompressedAttentionInputs) -> tuple[Tensor, Tensor]:
    """The results of ``forward``, written to nothing."""
    parts = [part[1:] for part in _parts(inputs)]
    if not parts:
        return _empty_outputs(inputs)
    o, index = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return o.to(inputs.v.dtype), index


def _parts(inputs: CompressedAttentionInputs) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some queries at a time: which, their outputs and their lists."""
    blocks, (keys, values) = inputs.blocks, _heads_first(inputs)
    for part, tokens in query_chunks(inputs.length, inputs.query_start):
        seen, position = blocks.complete(tokens), _positions(inputs, part)
        weights = _weights(inputs.q[:, part], keys[:, :, :seen], position, blocks, inputs.scale)
        read = weights.flatten(2, 3) @ values[:, :, :seen]
        scores = importance(weights.sum(3), blocks, blocks.selectable(inputs.tokens))
        o = rearrange(read, "b g (t r) v -> b t (g r) v", t=position.shape[1])
        yield part, o, select_blocks(scores, position, blocks)


def backward(inputs: CompressedAttentionInputs, upstream: Upstream) -> list[Tensor]:
    q, blocks, scale, (keys, values) = inputs.q, inputs.blocks, inputs.scale, _heads_first(inputs)
    (do,), (dk, dv) = upstream.gradients, (torch.zeros_like(x) for x in (keys, values))
    dq = q.new_zeros(q.shape)
    for part, tokens in query_chunks(inputs.length, inputs.query_start):
        seen, position = blocks.complete(tokens), _positions(inputs, part)
        weights = _weights(q[:, part], keys[:, :, :seen], position, blocks, scale).flatten(2, 3)
        d_read = _by_key_head(do[:, part], keys)
        dweights = d_read @ values[:, :, :seen].mT
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
        dv[:, :, :seen] += weights.mT @ d_read
        dk[:, :, :seen] += dscores.mT @ _by_key_head(q[:, part], keys)
        dq[:, part] = rearrange(dscores @ keys[:, :, :seen], "b g (t r) k -> b t (g r) k", t=position.shape[1])
    dk, dv = (d.transpose(1, 2).to(x.dtype).contiguous() for d, x in ((dk, inputs.k), (dv, inputs.v)))
    return [dq, dk, dv, torch.empty(0)]  # none of the starts


def _empty_outputs(inputs: CompressedAttentionInputs) -> tuple[Tensor, Tensor]:
    q, v, listed = inputs.q, inputs.v, inputs.blocks.listed(inputs.tokens)
    index = torch.empty(*q.shape[:2], v.shape[2], listed, dtype=torch.int64, device=q.device)
    return v.new_empty(*q.shape[:3], v.shape[3]), index


_operator = Operator(
    *("compressed_attention", CompressedAttentionInputs, forward, backward),
    *(lambda inputs: plain(inputs)[0], _empty_outputs),
)
_attend = whole(_operator, forward, plain)


def _positions(inputs: CompressedAttentionInputs, part: slice) -> Tensor:
    """The places of a chunk's queries in their rows: ``[1, C]``, or ``[B, C]`` where rows begin at their own tokens."""
    start, key_start = inputs.query_start, inputs.key_start
    at = torch.arange(start + part.start, start + part.stop, device=inputs.device)[None]
    return at if key_start is None else at - key_start[:, None]


def _heads_first(inputs: CompressedAttentionInputs) -> tuple[Tensor, Tensor]:
    """Keys and values as ``[B, G, M, K]``, in the dtype of scores and sums."""
    wide = accumulation_dtype(inputs.q, inputs.k, inputs.v)
    return inputs.k.transpose(1, 2).to(wide), inputs.v.transpose(1, 2).to(wide)


def _by_key_head(x: Tensor, keys: Tensor) -> Tensor:
    """``[B, C, H, K]`` to ``[B, G, C H / G, K]``."""
    return rearrange(x, "b t (g r) k -> b g (t r) k", g=keys.shape[1]).to(keys.dtype)


def _weights(q: Tensor, keys: Tensor, position: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """Softmax weights ``[B, G, C, H / G, M]`` of a chunk's queries; 0 where a block is not complete."""
    scores = (_by_key_head(q, keys) * scale) @ keys.mT
    last = torch.arange(keys.shape[2], device=q.device) * blocks.stride + blocks.length - 1
    hidden = (last > position[..., None])[:, None, :, None]
    weights = scores.unflatten(2, (q.shape[1], -1)).masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return weights.masked_fill(hidden, 0)
