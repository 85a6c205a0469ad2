"""Attention over compressed blocks of keys and values, which also tells which blocks deserve to be read in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.sparse_attention.selection import Blocks, importance, positions, query_chunks, select_blocks, whole
from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.native.custom_op import Formula, Saved, define


class BlockCompressor(nn.Module):
    """Each block ``x_0 ... x_{l-1}`` of tokens to one: ``W_out silu(W_in [x_i + e_i])``, blocks a stride apart.

    ``e`` is a learnt embedding of the place in the block. All heads share it. Matrices start as ``nn.Linear``'s,
    embeddings normal with standard deviation 0.02.

    Args:
        width: K, of a head.
        length, stride: of the blocks; the stride divides the length.
        hidden: the inner width.
    """

    def __init__(self, width: int, length: int, stride: int, hidden: int):
        super().__init__()
        self.length, self.stride = length, stride
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        # no nn.Linear: a mixer's costs count those once per token
        self.w_in = _matrix(hidden, length * width)
        self.w_out = _matrix(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, G, K]`` to ``[B, M, G, K]``, M the whole blocks in T tokens."""
        if x.shape[1] < self.length:  # no blocks, of which a gradient of zeros reaches the parameters
            blocks = x[:, :0, :, None].expand(-1, -1, -1, self.length, -1)
        else:
            count, strides = (x.shape[1] - self.length) // self.stride + 1, self.length // self.stride
            pieces = x[:, : (count + strides - 1) * self.stride].unflatten(1, (-1, self.stride))
            blocks = torch.cat([pieces[:, i : i + count] for i in range(strides)], dim=2).transpose(2, 3)
        blocks = blocks + self.place
        return F.linear(F.silu(F.linear(blocks.flatten(-2), self.w_in)), self.w_out)

    def flops(self, blocks: int) -> int:
        """FLOPs of so many compressed blocks, counted over rows and heads."""
        return 2 * blocks * (self.w_in.numel() + self.w_out.numel())


def _matrix(fan_out: int, fan_in: int) -> nn.Parameter:
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(fan_out, fan_in).uniform_(-bound, bound))


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    *,
    before: int = 0,
    start: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to the compressed blocks that are complete, and the lists of blocks that it recommends.

    A query at position t sees block i once ``stride i + length - 1 <= t``; one that sees none gives 0. The lists follow
    :func:`select_blocks` on the :func:`importance` of the softmax weights, summed over the queries' heads that share a
    key head. No gradient flows through them. Scores exist a chunk of queries at a time, and again in the backward pass.

    Args:
        q: ``[B, T, H, K]``.
        k, v: ``[B, M, G, K]`` and ``[B, M, G, V]``, the blocks from each row's first token on.
        before: tokens before the first query, in the longest row.
        start: ``[B]``, by how many tokens each row is shorter than that.
        scale: defaults to ``K ** -0.5``.

    Returns:
        o ``[B, T, H, V]`` and the lists ``[B, T, G, S]``, int64.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(q.device):  # in bfloat16 other blocks would be chosen
        return _attend(q, k, v, start, before, blocks, scale)


def forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, before: int, sizes: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    o, index = _outputs(q, k, v, start, before, sizes, scale)
    for part, read, chosen in _parts(q, k, v, start, before, sizes, scale):
        o[:, part], index[:, part] = read, chosen
    return o, index


def plain(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, before: int, sizes: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """What ``forward`` computes, written to nothing."""
    parts = [part[1:] for part in _parts(q, k, v, start, before, sizes, scale)]
    if not parts:
        return _outputs(q, k, v, start, before, sizes, scale)
    o, index = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return o.to(v.dtype), index


def _parts(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, before: int, sizes: Sequence[int], scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some queries at a time: which, their outputs and their lists."""
    blocks, keys, values = Blocks(*sizes), _heads_first(q, k), _heads_first(q, v)
    for part, tokens in query_chunks(q.shape[1], before):
        seen, position = blocks.complete(tokens), positions(part, before, start, q.device)
        weights = _weights(q[:, part], keys[:, :, :seen], position, blocks, scale)
        read = weights.flatten(2, 3) @ values[:, :, :seen]
        scores = importance(weights.sum(3), blocks, blocks.selectable(before + q.shape[1]))
        o = rearrange(read, "b g (t r) v -> b t (g r) v", t=position.shape[1])
        yield part, o, select_blocks(scores, position, blocks)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    before: int,
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks, keys, values = Blocks(*sizes), _heads_first(q, k), _heads_first(q, v)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for part, tokens in query_chunks(q.shape[1], before):
        seen, position = blocks.complete(tokens), positions(part, before, start, q.device)
        weights = _weights(q[:, part], keys[:, :, :seen], position, blocks, scale).flatten(2, 3)
        upstream = _by_key_head(do[:, part], keys)
        dweights = upstream @ values[:, :, :seen].mT
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
        dv[:, :, :seen] += weights.mT @ upstream
        dk[:, :, :seen] += dscores.mT @ _by_key_head(q[:, part], keys)
        dq[:, part] = rearrange(dscores @ keys[:, :, :seen], "b g (t r) k -> b t (g r) k", t=position.shape[1])
    return dq, dk.transpose(1, 2).to(k.dtype).contiguous(), dv.transpose(1, 2).to(v.dtype).contiguous()


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, before: int, sizes: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    blocks = Blocks(*sizes)
    listed = min(blocks.count, blocks.selectable(before + q.shape[1]))
    index = torch.empty(*q.shape[:2], k.shape[2], listed, dtype=torch.int64, device=q.device)
    return v.new_empty(*q.shape[:3], v.shape[3]), index


def _differentiate(call: Saved, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _gradient(do, *call.inputs)


_operator, _gradient = define(
    "compressed_attention", forward, backward, _outputs,
    lambda do, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    Formula(_differentiate, lambda *inputs: plain(*inputs)[0]),
)  # fmt: skip
_attend = whole(_operator, forward, plain)


def _heads_first(q: Tensor, x: Tensor) -> Tensor:
    return x.transpose(1, 2).to(accumulation_dtype(q, x))


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


def flops(queries: int, before: int, heads: int, width: int, blocks: Blocks, batch_size: int = 1) -> int:
    """FLOPs of :func:`compressed_attention`: a chunk's queries are all scored with the blocks that its last may see."""
    pairs = sum((part.stop - part.start) * blocks.complete(tokens) for part, tokens in query_chunks(queries, before))
    return 4 * batch_size * heads * pairs * width
