"""DeepSeek sparse attention (DSA): a small indexer picks the tokens that each query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.attention.base import KVHeadsConfig
from seqarch.layers.mixer import Boundaries, first_tensor
from seqarch.layers.modules import kv_cache
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.heads import HeadProjection
from seqarch.layers.modules.kv_cache import KVCache
from seqarch.layers.modules.linear import Linear, widened
from seqarch.layers.sparse_attention.row_attention import CacheShape, RowAttention, positions
from seqarch.ops.attention import flops as attention_flops
from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.index_topk import flops as index_flops


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
        _, turning = self.rotary_widths
        if self.position == "rotary" and (turning % 2 or not turning):
            raise ValueError(f"rotary positions need an even number of channels, got {turning} of index_width")

    @property
    def rotary_widths(self) -> tuple[int, ...]:
        return self.rotary_width, int(self.rotary_fraction * self.index_width)


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

    Departures: the release builds on multi-head latent attention and reads the indexer's queries from its latent;
    here they come from the input, and the attention has plain grouped heads. ``rotary_fraction`` holds for index heads
    too (in the release half of them turns). Its 8-bit scores and their Hadamard transform are left out: the indexer
    runs in float32 whatever the rest runs in, since in bfloat16 it would choose otherwise. As there, index keys have a
    layer norm and scores are scaled by ``(heads width)^-1/2``. Projections have ``nn.Linear``'s initialisation.

    The indexer scores all ``T^2 / 2`` pairs, a chunk of queries at a time; attention reads ``T top_k``. In training the
    loss needs the attention's scores once more, of all pairs a chunk at a time, which beats gathering the chosen keys
    until T is some twenty times ``top_k``; :meth:`flops` does not count it.
    """

    Config = DSAConfig
    unquantized = ("index_weight",)
    State = DSAState

    @from_options
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
        at = positions(x, before, start)
        (q, k, v), _ = self.qkv_proj(x)
        q, k = self.rotate(q, k, at=at)
        k, v, cache = kv_cache.extend(state.cache, k, v, None)
        with without_autocast(x.device):  # in bfloat16 other tokens would be chosen
            index_q, index_k, weight = self._index(x, at)
            index_k, _, index = kv_cache.extend(state.index, index_k, index_k[..., :0], None)
        indexer, chosen = (index_q, index_k.squeeze(2), weight), None
        if k.shape[1] > self.config.top_k:
            chosen = ops.index_topk(*indexer, self.config.top_k, key_start=start)
        if self.training and torch.is_grad_enabled():
            loss = ops.indexer_loss(*indexer, q, k, chosen, key_start=start).sum()
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
        config, after, index = self.config, before + queries, 0
        if after > config.top_k:
            index = index_flops(queries, after, config.index_heads, config.index_width, batch_size)
        width = config.head_width  # as many tokens as in a window of top_k, though others
        return index + attention_flops(queries, after, config.heads, width, width, True, config.top_k, batch_size)
