"""The base of attentions whose lightning indexer picks the tokens that each query attends to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
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
        give_index: a name of one's own, by which later layers of the stack attend to what this layer's indexer chose.
        take_index: such a name: the layer has no indexer, keeps no keys of one, and attends to the tokens that the last
            earlier layer that gives this name chose, with the same ``top_k`` (Bai et al. 2026, "IndexCache:
            Accelerating Sparse Attention via Cross-Layer Index Reuse"; GLM-5.2). ``index_loss_weight`` then weighs
            what this layer's own attention teaches that indexer; the other options of an indexer are without effect.
    """

    may_be_zero = (*LayerConfig.may_be_zero, "index_loss_weight")

    top_k: int = 2048
    index_heads: int = 4
    index_width: int = 32
    index_loss_weight: float = 1.0
    give_index: str | None = None
    take_index: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.give_index is not None and self.take_index is not None:
            raise ValueError(
                f"give_index ({self.give_index!r}) and take_index ({self.take_index!r}): expected one of them"
            )
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


class CacheState(NamedTuple):
    """State of an attention that takes an earlier layer's choice.

    Attributes:
        cache: what the attention reads of each token, rotated.
    """

    cache: KVCache


class Choice(NamedTuple):
    """What an indexer chose for the queries of a call, or of one of its packed sequences.

    Attributes:
        tokens: ``[B, T, S]``, as :func:`seqarch.ops.index_topk` lists them; ``None`` for all up to each query's own.
        indexer: the queries, keys and heads' weights whose scores chose them, which the loss teaches.
    """

    tokens: Tensor | None
    indexer: tuple[Tensor, Tensor, Tensor]


class IndexedAttention(RowAttention):
    """Attention to the ``top_k`` tokens s of the largest ``I_ts = sum_h w_th relu(q^I_th . k^I_s)`` up to t.

    A subclass says in :meth:`project` what it caches of a token and in :meth:`attend` how it reads chosen tokens, and
    makes the indexer's modules by :meth:`make_indexer`. The indexer's input is detached and its choice has no
    gradient: it learns from :meth:`auxiliary_loss` alone, of this layer and of those that take its choice.
    """

    unquantized = ("index_weight",)
    out_proj: nn.Module

    def __init__(self, config: Any):
        super().__init__(config)
        self._losses: list[Tensor] = []
        self.gives = () if config.give_index is None else (_shared(config.give_index),)
        self.takes = () if config.take_index is None else (_shared(config.take_index),)
        self.State = CacheState if self.takes else IndexedState

    def make_indexer(self, queries_from: int, norm_eps: float = 1e-5) -> None:
        """The indexer's modules, its queries made of ``queries_from`` channels; none where the choice is taken."""
        config = self.config
        if self.takes:
            return
        self.index_query = Linear(queries_from, config.index_heads * config.index_width, bias=False)
        self.index_key = Linear(config.d_model, config.index_width, bias=False)
        self.index_norm = nn.LayerNorm(config.index_width, eps=norm_eps)
        self.index_weight = Linear(config.d_model, config.index_heads, bias=False)

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
        learns = self.config.index_loss_weight or self.takes
        return () if learns else ("index_query", "index_key", "index_weight")

    def mix(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> tuple[Tensor, Any]:
        return self.exchange(x, state, cu_seqlens, {})[:2]

    def exchange(
        self, x: Tensor, state: Any, cu_seqlens: Boundaries, taken: Mapping[str, Any]
    ) -> tuple[Tensor, Any, Mapping[str, Any]]:
        """As of any mixer; what is handed on is the :class:`Choice` of all rows, or of each packed sequence in turn."""
        self._losses, chosen = [], []
        earlier = iter(taken[self.takes[0]]) if self.takes else None

        def mix_rows(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, state, choice = self._mix_rows(x, state, None if earlier is None else next(earlier))
            chosen.append(choice)
            return y, state

        y, state = self.in_rows(mix_rows, x, state, cu_seqlens)
        self._losses = [loss / max(1, x.shape[0] * x.shape[1]) for loss in self._losses]
        return y, state, dict.fromkeys(self.gives, chosen)

    def _mix_rows(self, x: Tensor, state: Any, choice: Choice | None) -> tuple[Tensor, Any, Choice]:
        """Outputs and state of rows, attending to an earlier layer's choice or to one's own; and that choice."""
        index: list[KVCache] = []
        start = state.cache.start
        at = positions(x, state.cache.length, start)
        q, k, v, source = self.project(x, at)
        k, v, cache = kv_cache.extend(state.cache, k, v, None)
        if choice is None:
            choice, *index = self._choose(x, at, source, state.index, start)
        if self.training and torch.is_grad_enabled() and self.config.index_loss_weight:
            queries, keys, scale = self.scored(q, k)
            options = {"scale": scale, "key_start": start}
            loss = ops.indexer_loss(*choice.indexer, queries, keys, choice.tokens, **options).sum()
            self._losses = [*self._losses, loss]
        o = self.attend(q, k, v, choice.tokens, start)
        return self.out_proj(rearrange(o, "b t h v -> b t (h v)")), self.State(cache, *index), choice

    def _choose(
        self, x: Tensor, at: Tensor, source: Tensor, index: KVCache, start: Tensor | None
    ) -> tuple[Choice, KVCache]:
        """What the indexer chooses, and its cache after these tokens."""
        with without_autocast(x.device):  # in bfloat16 other tokens would be chosen
            q, k, weight = self._index(x, at, source)
            k, _, index = kv_cache.extend(index, k, k[..., :0], None)
        indexer, tokens = (q, k.squeeze(2), weight), None
        if k.shape[1] > self.config.top_k:
            tokens = ops.index_topk(*indexer, self.config.top_k, key_start=start)
        return Choice(tokens, indexer), index

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

    def index_caches(self, length: int) -> list[CacheShape]:
        """The shape of the indexer's cache, if there is one."""
        return [] if self.takes else [CacheShape(length, 1, self.config.index_width, 0, wide=True)]

    def check_giver(self, giver: Any) -> None:
        own, other = self.config, giver.config
        if not isinstance(giver, IndexedAttention):
            raise ValueError("that has no indexer")
        if own.top_k != other.top_k:
            raise ValueError(f"its top_k is {own.top_k}, expected {other.top_k} as {own.take_index!r} chooses")
        if own.index_loss_weight and not other.index_loss_weight:
            raise ValueError(
                f"its index_loss_weight is {own.index_loss_weight}, expected 0 as the indexer of {own.take_index!r}"
                " does not learn"
            )

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return self._flops(length, 0, batch_size)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        once = self.flops(1, batch_size) - self.sequence_flops(1, batch_size)
        return once + self._flops(1, length, batch_size)

    def _flops(self, queries: int, before: int, batch_size: int) -> int:
        config, after, index = self.config, before + queries, 0
        if after > config.top_k and not self.takes:
            index = index_flops(queries, after, config.index_heads, config.index_width, batch_size)
        return index + self.read_flops(queries, after, batch_size)

    @abstractmethod
    def read_flops(self, queries: int, keys: int, batch_size: int) -> int:
        """FLOPs of :meth:`attend`, for the last so many of so many tokens: each reads at most ``top_k``."""


def _shared(name: str) -> str:
    """What the choices of this name are handed on as."""
    return f"index lists {name!r}"
