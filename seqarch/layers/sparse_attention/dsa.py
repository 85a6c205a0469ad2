"""DeepSeek sparse attention (DSA): a small indexer picks the tokens that each query attends to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.attention.base import KVHeadsConfig
from seqarch.layers.mixer import Boundaries, first_tensor
from seqarch.layers.modules import kv_cache
from seqarch.layers.modules.heads import HeadProjection
from seqarch.layers.modules.kv_cache import KVCache
from seqarch.layers.modules.linear import Linear, widened
from seqarch.layers.sparse_attention.row_attention import CacheShape, RowAttention
from seqarch.layers.sparse_attention.selection import largest, positions, query_chunks, whole
from seqarch.ops.attention import flops as attention_flops
from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.dispatch.eager import active_transform
from seqarch.ops.native.custom_op import Formula, Saved, differentiate


@dataclass(frozen=True, kw_only=True)
class DSAConfig(KVHeadsConfig):
    """Options of :class:`DSA`.

    Attributes:
        top_k: tokens that a query attends to, or all before it where they are fewer.
        index_heads: heads of the indexer's queries; the release has half as many as the attention.
        index_width: width of its queries and of its one key per token.
        index_loss_weight: what :meth:`DSA.auxiliary_loss` weighs the indexer's loss by.
    """

    may_be_zero = (*KVHeadsConfig.may_be_zero, "index_loss_weight")

    top_k: int = 2048
    index_heads: int = 4
    index_width: int = 32
    index_loss_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.top_k == 1:
            raise ValueError("top_k=1 leaves the indexer nothing to learn from: expected at least 2")
        turning = int(self.rotary_fraction * self.index_width)
        if self.position == "rotary" and (turning % 2 or not turning):
            raise ValueError(f"rotary positions need an even number of channels, got {turning} of index_width")


class DSAState(NamedTuple):
    """State of :class:`DSA`.

    Attributes:
        cache: keys (rotated) and values.
        index: the indexer's keys, float32 or wider; its values have no width.
    """

    cache: KVCache
    index: KVCache


class DSA(RowAttention):
    """Attention to the ``top_k`` tokens s of the largest ``I_ts = sum_h w_th relu(q^I_th . k^I_s)`` up to t.

    DeepSeek-AI 2025, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", section 2.1. The indexer has
    few narrow heads and one key per token; all heads attend to the same tokens, of equal scores the earlier. A token
    itself is chosen by its score as any other, not by force. Where no more than ``top_k`` tokens are there at all, the
    choice is all of them and is not computed.

    *How the indexer learns.* Its input is detached and its choice has no gradient, so the outputs teach it nothing.
    While training, :meth:`auxiliary_loss` is ``KL(p_t || softmax(I_t))`` over the chosen tokens, averaged over t, where
    p is the attention's own distribution, averaged over the heads; p is detached, so the loss teaches the indexer
    alone. This is the paper's sparse stage. Its dense warm-up is the same loss with ``top_k`` no smaller than the
    sequences and all other parameters frozen.

    Departures: the release stands on multi-head latent attention and reads the indexer's queries from its latent;
    here they come from the input, and the attention has plain grouped heads. ``rotary_fraction`` holds for index heads
    too (in the release half of them turns). Its 8-bit scores and their Hadamard transform are left out: the indexer
    runs in float32 whatever the rest runs in, since in bfloat16 it would choose otherwise. As there, index keys have a
    layer norm and scores are scaled by ``(heads width)^-1/2``. Projections have ``nn.Linear``'s initialisation.

    The indexer scores all ``T^2 / 2`` pairs, a chunk of queries at a time; attention reads ``T top_k``. In training the
    loss needs the attention's scores once more, of all pairs a chunk at a time, which beats gathering the chosen keys
    until T is some twenty times ``top_k``; :meth:`flops` does not count it.
    """

    Config = DSAConfig
    State = DSAState

    def __init__(self, config: DSAConfig):
        super().__init__(config)
        heads, width = config.heads, config.head_width
        self.qkv_proj = HeadProjection(config.d_model, [(heads, width), *[(config.kv_heads, width)] * 2])
        self.index_query = Linear(config.d_model, config.index_heads * config.index_width, bias=False)
        self.index_key = Linear(config.d_model, config.index_width, bias=False)
        self.index_norm = nn.LayerNorm(config.index_width)
        self.index_weight = Linear(config.d_model, config.index_heads, bias=False)
        self.out_proj = Linear(heads * width, config.d_model, bias=False)
        self._losses: list[Tensor] = []

    def mix(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> tuple[Tensor, Any]:
        self._losses = []
        y, state = super().mix(x, state, cu_seqlens)
        self._losses = [loss / max(1, x.shape[0] * x.shape[1]) for loss in self._losses]
        return y, state

    def mix_rows(self, x: Tensor, state: DSAState) -> tuple[Tensor, DSAState]:
        before, start = state.cache.length, state.cache.start
        at = positions(slice(0, x.shape[1]), before, start, x.device)
        (q, k, v), _ = self.qkv_proj(x)
        q, k = self.rotate(q, k, at=at)
        k, v, cache = kv_cache.extend(state.cache, k, v, None)
        with without_autocast(x.device):  # in bfloat16 other tokens would be chosen
            index_q, index_k, weight = self._index(x, at)
            index_k, _, index = kv_cache.extend(state.index, index_k, index_k[..., :0], None)
            chosen = None
            if k.shape[1] > self.config.top_k:
                chosen = _choose(*(x.detach() for x in (index_q, index_k, weight)), self.config.top_k, before, start)
            if self.training and torch.is_grad_enabled():
                loss = _loss(index_q, index_k, weight, q.detach(), k.detach(), chosen, before, start)
                self._losses = [*self._losses, loss]
        if chosen is None:
            o = ops.attention(q, k, v, key_start=start)
        else:
            lists = chosen.unsqueeze(2).expand(-1, -1, k.shape[2], -1)
            o = ops.block_sparse_attention(q, k, v, lists, 1, key_start=start)
        return self.out_proj(rearrange(o, "b t h v -> b t (h v)")), DSAState(cache, index)

    def _index(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The indexer's queries ``[B, T, Hi, Ki]``, keys ``[B, T, 1, Ki]`` and heads' weights ``[B, T, Hi]``."""
        x = x.detach().to(accumulation_dtype(x, first_tensor(self)))
        q, k, weight = (widened(each, x) for each in (self.index_query, self.index_key, self.index_weight))
        k = widened(self.index_norm, k)
        q, k = self.rotate(q.unflatten(-1, (-1, k.shape[-1])), k.unsqueeze(2), at=at)
        return q, k, weight * (q.shape[2] * q.shape[3]) ** -0.5

    def auxiliary_loss(self) -> Tensor | None:
        """The indexer's weighted loss of the last forward pass; ``None`` unless that was training."""
        return self.config.index_loss_weight * torch.stack(self._losses).sum() if self._losses else None

    def __getstate__(self) -> dict[str, Any]:
        # a copy or a pickle of the module does not take the last call's autograd graph along
        return {**self.__dict__, "_losses": []}

    def caches(self, length: int) -> list[CacheShape]:
        config = self.config
        kv = CacheShape(length, config.kv_heads, config.head_width, config.head_width)
        return [kv, CacheShape(length, 1, config.index_width, 0, wide=True)]

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return self._flops(length, 0, batch_size)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        once = self.flops(1, batch_size) - self.sequence_flops(1, batch_size)
        return once + self._flops(1, length, batch_size)

    def _flops(self, queries: int, before: int, batch_size: int) -> int:
        config, after, pairs = self.config, before + queries, 0
        if after > config.top_k:
            pairs = sum((part.stop - part.start) * tokens for part, tokens in query_chunks(queries, before))
        index = 2 * batch_size * pairs * config.index_heads * (config.index_width + 1)
        width = config.head_width  # as many tokens as in a window of top_k, though others
        return index + attention_flops(queries, after, config.heads, width, width, True, config.top_k, batch_size)


def _index_scores(q: Tensor, k: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``I [B, C, M]`` of a chunk's queries, and the products ``[B, C, Hi, M]`` that it sums."""
    products = (q.flatten(1, 2) @ k[:, :, 0].mT).unflatten(1, q.shape[1:3])
    return (weight.unsqueeze(2) @ products.relu()).squeeze(2), products


def _visible(part: slice, tokens: int, before: int, start: Tensor | None, device: torch.device) -> Tensor:
    """Which of the first ``tokens`` keys each query of a chunk sees: ``[1 or B, C, tokens]``."""
    key = torch.arange(tokens, device=device)
    seen = key <= torch.arange(before + part.start, before + part.stop, device=device)[:, None]
    return seen[None] if start is None else seen & (key >= start[:, None, None])


def choose(q: Tensor, k: Tensor, weight: Tensor, count: int, before: int, start: Tensor | None) -> Tensor:
    """The chosen tokens of each query, ``[B, T, count]``, counted from its row's first; -1 where there are fewer."""
    chosen = [torch.empty(q.shape[0], 0, count, dtype=torch.int64, device=q.device)]
    for part, tokens in query_chunks(q.shape[1], before):
        scores, _ = _index_scores(q[:, part], k[:, :tokens], weight[:, part])
        seen = _visible(part, tokens, before, start, q.device).expand_as(scores)
        best = largest(scores.masked_fill(~seen, -torch.inf), count)
        listed = best if start is None else best - start[:, None, None]
        listed = listed.masked_fill(~seen.gather(-1, best), -1)
        chosen.append(F.pad(listed, (0, count - best.shape[-1]), value=-1))
    return torch.cat(chosen, dim=1)


class _Compared(NamedTuple):
    """A chunk's queries and the tokens up to its last.

    Attributes:
        part, tokens: the queries, and how many tokens.
        products: ``[B, C, Hi, M]``, of index queries and index keys.
        log_guess: ``log softmax(I) [B, C, M]`` over the tokens that each chose.
        target: p, their weights in the attention.
        loss: the sum of the queries' divergences.
    """

    part: slice
    tokens: int
    products: Tensor
    log_guess: Tensor
    target: Tensor
    loss: Tensor


def _compare(
    index_q: Tensor,
    index_k: Tensor,
    weight: Tensor,
    q: Tensor,
    k: Tensor,
    chosen: Tensor | None,
    before: int,
    start: Tensor | None,
) -> Iterator[_Compared]:
    q, k = q.to(index_q.dtype), k.to(index_q.dtype)
    for part, tokens in query_chunks(q.shape[1], before):
        seen = _visible(part, tokens, before, start, q.device)
        if chosen is not None:
            seen = seen & _listed(chosen[:, part], tokens, start)
        scores, products = _index_scores(index_q[:, part], index_k[:, :tokens], weight[:, part])
        log_guess = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
        target = _mean_weights(q[:, part], k[:, :tokens], seen)
        loss = (target.xlogy(target) - target * log_guess.masked_fill(~seen, 0)).sum()
        yield _Compared(part, tokens, products, log_guess, target, loss)


def index_loss(
    index_q: Tensor,
    index_k: Tensor,
    weight: Tensor,
    q: Tensor,
    k: Tensor,
    chosen: Tensor | None,
    before: int,
    start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over the queries of ``KL(p || softmax(I))`` over the tokens that each chose, ``None`` for all.

    Its gradient by the scores is ``softmax(I) - p``, known as soon as the loss is: those of the first three arguments
    follow it, and the backward pass only scales them.
    """
    loss, dq, dk, dweight = (torch.zeros_like(x) for x in (index_q.sum(), index_q, index_k, weight))
    for part, tokens, products, log_guess, target, own in _compare(
        index_q, index_k, weight, q, k, chosen, before, start
    ):
        loss += own
        keys, dscores = index_k[:, :tokens, 0], (log_guess.exp() - target).unsqueeze(2)
        dweight[:, part] = (dscores @ products.relu().mT).squeeze(2)
        dproducts = (weight[:, part].unsqueeze(-1) * dscores * (products > 0)).flatten(1, 2)
        dq[:, part] = (dproducts @ keys).unflatten(1, products.shape[1:3])
        dk[:, :tokens, 0] += dproducts.mT @ index_q[:, part].flatten(1, 2)
    return loss, dq, dk, dweight


def _plain_loss(index_q: Tensor, index_k: Tensor, weight: Tensor, q: Tensor, k: Tensor, *others: Any) -> Tensor:
    """The loss of :func:`index_loss`, which torch differentiates in any way; q and k get no gradient."""
    parts = [part.loss for part in _compare(index_q, index_k, weight, q.detach(), k.detach(), *others)]
    return torch.stack(parts).sum() if parts else 0 * (index_q.sum() + index_k.sum() + weight.sum())


def _scaled(call: Saved, dloss: Tensor) -> list[Tensor]:
    return [dloss * gradient for gradient in call.kept]


_choose_operator = torch.library.custom_op("seqarch::index_choice", choose, mutates_args=())
_choose_operator.register_fake(lambda q, k, weight, count, *_: q.new_empty(*q.shape[:2], count, dtype=torch.int64))
_choose = whole(_choose_operator, choose, choose)

_loss_operator = torch.library.custom_op("seqarch::index_loss", index_loss, mutates_args=())
_loss_operator.register_fake(lambda *given: (given[0].new_empty(()), *(torch.empty_like(x) for x in given[:3])))
differentiate(_loss_operator, Formula(_scaled, _plain_loss, keeps=(1, 2, 3)))


def _loss(*arguments: Any) -> Tensor:
    return _loss_operator(*arguments)[0] if active_transform() is None else _plain_loss(*arguments)


def _listed(chosen: Tensor, tokens: int, start: Tensor | None) -> Tensor:
    """Which of the first ``tokens`` keys stand in lists ``[B, C, count]``: ``[B, C, tokens]``."""
    at = chosen if start is None else chosen + start[:, None, None]
    at = at.masked_fill(chosen < 0, tokens)  # one place more, for what is no token
    listed = torch.zeros(*chosen.shape[:2], tokens + 1, dtype=torch.bool, device=chosen.device)
    return listed.scatter(-1, at, True)[..., :tokens]


def _mean_weights(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Softmax weights ``[B, C, M]`` of a chunk's queries over the keys that they see, averaged over the heads."""
    queries = rearrange(q * q.shape[-1] ** -0.5, "b t (g r) k -> b g (t r) k", g=k.shape[2])
    scores = rearrange(queries @ rearrange(k, "b s g k -> b g k s"), "b g (t r) s -> b t (g r) s", t=q.shape[1])
    return scores.masked_fill(~seen.unsqueeze(2), -torch.inf).softmax(-1).mean(2)
