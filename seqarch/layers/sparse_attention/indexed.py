"""The base of attentions whose lightning indexer picks the tokens that each query attends to."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.mixer import Boundaries, LayerConfig, first_tensor
from seqarch.layers.modules import kv_cache
from seqarch.layers.modules.kv_cache import KVCache
from seqarch.layers.modules.linear import Linear, widened
from seqarch.layers.sparse_attention.row_attention import CacheShape, RowAttention, positions
from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.index_topk import flops as index_flops


@dataclass(frozen=True, kw_only=True)
class IndexedConfig(LayerConfig):
    """Options of the indexer.

    Attributes:
        top_k: tokens that a query attends to, or all before it where they are fewer.
        index_heads: heads of the indexer's queries; the release has half as many as the attention.
        index_width: width of its queries and of its one key per token.
        index_loss_weight: what ``auxiliary_loss`` weighs the indexer's loss by; with 0 there is none, and the indexer
            stays as it is.
    """

    may_be_zero = (*LayerConfig.may_be_zero, "index_loss_weight")

    top_k: int = 2048
    index_heads: int = 4
    index_width: int = 32
    index_loss_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.top_k == 1:
            raise ValueError("top_k=1 leaves the indexer nothing to learn from: expected at least 2")


class IndexedState(NamedTuple):
    """State of an attention with an indexer.

    Attributes:
        cache: what the attention reads of each token, rotated.
        index: the indexer's keys, float32 or wider; its values have no width.
    """

    cache: KVCache
    index: KVCache


class IndexedAttention(RowAttention):
    """Attention to the ``top_k`` tokens s of the largest ``I_ts = sum_h w_th relu(q^I_th . k^I_s)`` up to t.

    A subclass says in :meth:`project` what it caches of a token and in :meth:`attend` how it reads chosen tokens, and
    makes the indexer's modules by :meth:`make_indexer`. The indexer's input is detached and its choice has no
    gradient: it learns from :meth:`auxiliary_loss` alone.
    """

    State = IndexedState
    unquantized = ("index_weight",)
    out_proj: nn.Module

    def make_indexer(self, queries_from: int, norm_eps: float = 1e-5) -> None:
        """The indexer's modules, whose queries are made of ``queries_from`` channels."""
        config = self.config
        self.index_query = Linear(queries_from, config.index_heads * config.index_width, bias=False)
        self.index_key = Linear(config.d_model, config.index_width, bias=False)
        self.index_norm = nn.LayerNorm(config.index_width, eps=norm_eps)
        self.index_weight = Linear(config.d_model, config.index_heads, bias=False)
        self._losses: list[Tensor] = []

    @abstractmethod
    def project(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries ``[B, T, H, K]``, keys and values to cache, and what the indexer's queries are made of."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None, start: Tensor | None) -> Tensor:
        """What queries read ``[B, Tq, H, V]`` of the tokens ``chosen [B, Tq, S]``, or of all up to their own."""

    @abstractmethod
    def scored(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float | None]:
        """Queries, keys and the scale whose softmax are the attention's weights, for the indexer's loss."""

    @property
    def without_gradient(self) -> tuple[str, ...]:
        """The linear maps that do not learn."""
        return () if self.config.index_loss_weight else ("index_query", "index_key", "index_weight")

    def mix(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> tuple[Tensor, Any]:
        self._losses = []
        y, state = super().mix(x, state, cu_seqlens)
        self._losses = [loss / max(1, x.shape[0] * x.shape[1]) for loss in self._losses]
        return y, state

    def mix_rows(self, x: Tensor, state: IndexedState) -> tuple[Tensor, IndexedState]:
        before, start = state.cache.length, state.cache.start
        at = positions(x, before, start)
        q, k, v, source = self.project(x, at)
        k, v, cache = kv_cache.extend(state.cache, k, v, None)
        with without_autocast(x.device):  # in bfloat16 other tokens would be chosen
            index_q, index_k, weight = self._index(x, at, source)
            index_k, _, index = kv_cache.extend(state.index, index_k, index_k[..., :0], None)
        indexer, chosen = (index_q, index_k.squeeze(2), weight), None
        if k.shape[1] > self.config.top_k:
            chosen = ops.index_topk(*indexer, self.config.top_k, key_start=start)
        if self.training and torch.is_grad_enabled() and self.config.index_loss_weight:
            queries, keys, scale = self.scored(q, k)
            loss = ops.indexer_loss(*indexer, queries, keys, chosen, scale=scale, key_start=start).sum()
            self._losses = [*self._losses, loss]
        o = self.attend(q, k, v, chosen, start)
        return self.out_proj(rearrange(o, "b t h v -> b t (h v)")), IndexedState(cache, index)

    def _index(self, x: Tensor, at: Tensor, source: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The indexer's queries ``[B, T, Hi, Ki]``, keys ``[B, T, 1, Ki]`` and heads' weights ``[B, T, Hi]``."""
        wide = accumulation_dtype(x, first_tensor(self))
        x, source = x.detach().to(wide), (x if source is None else source).detach().to(wide)
        q, k, weight = widened(self.index_query, source), widened(self.index_key, x), widened(self.index_weight, x)
        k = widened(self.index_norm, k)
        q, k = self.rotate(q.unflatten(-1, (-1, k.shape[-1])), k.unsqueeze(2), at=at)
        return q, k, weight * (q.shape[2] * q.shape[3]) ** -0.5

    def auxiliary_loss(self) -> Tensor | None:
        """The indexer's weighted loss of the last forward pass; ``None`` unless that was training."""
        return self.config.index_loss_weight * torch.stack(self._losses).sum() if self._losses else None

    def __getstate__(self) -> dict[str, Any]:
        # a copy or a pickle of the module does not take the last call's autograd graph along
        return {**self.__dict__, "_losses": []}

    def index_cache(self, length: int) -> CacheShape:
        """The shape of the indexer's cache."""
        return CacheShape(length, 1, self.config.index_width, 0, wide=True)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return self._flops(length, 0, batch_size)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        once = self.flops(1, batch_size) - self.sequence_flops(1, batch_size)
        return once + self._flops(1, length, batch_size)

    def _flops(self, queries: int, before: int, batch_size: int) -> int:
        config, after, index = self.config, before + queries, 0
        if after > config.top_k:
            index = index_flops(queries, after, config.index_heads, config.index_width, batch_size)
        return index + self.read_flops(queries, after, batch_size)

    @abstractmethod
    def read_flops(self, queries: int, keys: int, batch_size: int) -> int:
        """FLOPs of :meth:`attend`, for the last so many of so many tokens: each reads at most ``top_k``."""
