"""The bases of softmax attentions: heads, positions, and a cache that any split of a sequence hands on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from seqarch.layers.attention.options import CachedAttentionConfig
from seqarch.layers.mixer import Boundaries, Device, Mixer, first_tensor, measured_state_bytes, row_count
from seqarch.layers.modules import kv_cache
from seqarch.layers.modules.coded_cache import SmallCache
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadProjection
from seqarch.layers.modules.kv_cache import KVCache, PackedKV
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import AllHeadsNorm, HeadNorm, weights_of
from seqarch.layers.modules.positions import token_positions
from seqarch.layers.modules.rotary import rotary_tables, rotate


class AttentionState(NamedTuple):
    """State of an attention.

    Attributes:
        conv: the short convolution's last inputs, or ``None`` without one.
        cache: keys (rotated) and values.
    """

    conv: Tensor | None
    cache: KVCache | PackedKV


class Place(NamedTuple):
    """The positions of a call's tokens.

    Attributes:
        positions: in their own sequences, ``[1, T]`` where all rows are equally long, else ``[B, T]``.
        length: tokens of the longest sequence after this call, or more.
        cu_seqlens: boundaries of packed sequences; ``None`` where nothing is packed.
    """

    positions: Tensor
    length: int
    cu_seqlens: Boundaries


class Kept(NamedTuple):
    """All keys and values that a call's queries may read, held and new.

    Attributes:
        place: of the call's tokens.
        keys, values: ``[B, held + T, G, K]`` and ``[B, held + T, G, V]``; under packed sequences that go on, a list of
            those of each, ``[held + new, G, K]``.
        start: ``[B]``, the first that is held of each row; ``None`` for 0.
        window: how many tokens before it a token finds; ``None`` for all.
        bias: added to the scores of each key, ``[B, held + T, H]`` or a list of ``[held + new, H]``, or ``None``.
    """

    place: Place
    keys: Tensor | list[Tensor]
    values: Tensor | list[Tensor]
    start: Tensor | None
    window: int | None
    bias: Tensor | list[Tensor] | None = None


class CacheMixer(Mixer):
    """The cache of an attention; a subclass makes its entries in :meth:`project` and reads them in :meth:`attend`.

    Subclasses set ``cache_shape``: heads, and widths of keys and values, of what the cache holds of a token. One whose
    queries choose their keys writes :meth:`select` too; what it needs for that and carries from call to call follows
    ``conv`` and ``cache`` in its ``State``.

    The state grows with the sequence. A state made with ``max_length`` is written in place while autograd is off and
    no gradient flows through it; past that length it grows.
    """

    State: ClassVar[Any] = AttentionState

    cache_shape: tuple[int, int, int]
    gate: nn.Linear | None
    out_proj: nn.Linear

    @abstractmethod
    def project(self, x: Tensor, conv: Tensor | None, place: Place) -> tuple[list[Tensor], Tensor | None]:
        """Queries, keys and values of this call's tokens, and the short convolution's state."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, *selection: Tensor, **where: Any) -> Tensor:
        """The outputs ``[B, Tq, H, V]`` of the queries ``[B, Tq, H, K]`` over all keys, held and new.

        Args:
            where: the operation's ``cu_seqlens`` or ``key_start``, and its ``key_bias`` where there is one.
        """

    def select(self, q: Tensor, k: Tensor, place: Place, *entries: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """The further arguments of :meth:`attend`, ``[B, T, ...]`` each, and the state's further entries.

        Args:
            q, k: of this call's tokens, rotated.
            entries: the state's entries after conv and cache.
        """
        return (), ()

    def add_to_scores(self, x: Tensor, kept: Kept, *entries: Any) -> tuple[Kept, tuple[Any, ...]]:
        """What is read, with what is added to the scores of its keys, and the state's further entries."""
        return kept, entries

    @property
    def cache_window(self) -> int | None:
        """The number of earlier keys that a new token may see, :attr:`sink_tokens` and the last; ``None`` for all."""
        return None

    @property
    def sink_tokens(self) -> int:
        """The number of these that are the first of the sequence and stay in the cache."""
        return 0

    def mix(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> tuple[Tensor, Any]:
        y, state, _ = self.mix_and_keep(x, state, cu_seqlens)
        return y, state

    def mix_and_keep(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> tuple[Tensor, Any, Kept]:
        """As :meth:`mix`, and the keys and values that it has read."""
        conv, cache, *entries = state
        cache, place = self.place(cache, x, cu_seqlens)
        # q [B, T, H, K], k and v [B, T, G, K], normed and rotated; sparse kinds choose what each query reads
        (q, k, v), conv = self.project(x, conv, place)
        selection, entries = self.select(q, k, place, *entries)
        kept, cache = self.keep(cache, k, v, place)
        kept, entries = self.add_to_scores(x, kept, *entries)
        return self.read(x, (q, *selection), kept), self.State(conv, cache, *entries), kept

    def place(self, cache: Any, x: Tensor, cu_seqlens: Boundaries) -> tuple[Any, Place]:
        """The cache as rows, and where this call's tokens are in their sequences."""
        cache = cache.as_rows()
        _check_cache(cache, row_count(x, cu_seqlens), self.cache_window)
        return cache, Place(_positions(cache, x, cu_seqlens), cache.length + _longest(x, cu_seqlens), cu_seqlens)

    def read(self, x: Tensor, queries: Sequence[Tensor], kept: Kept) -> Tensor:
        """The mixer's outputs ``[B, T, D]``: what queries, and what they choose, read of all keys and values."""
        o = self.attend_to(kept, queries)
        return self.output(x, o if isinstance(o, Tensor) else torch.cat(o, dim=1))

    def attend_to(self, kept: Kept, queries: Sequence[Tensor]) -> Any:
        """What :meth:`attend` returns of all keys and values; a list for packed sequences that go on, one by one."""
        cu_seqlens, keys, values = kept.place.cu_seqlens, kept.keys, kept.values
        q, *selection = queries
        if isinstance(keys, Tensor):
            where: dict[str, Any] = {"key_start": kept.start} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
            where |= {} if kept.bias is None else {"key_bias": kept.bias}
            return self.attend(q, keys, values, *selection, **where)  # type: ignore[arg-type]
        assert cu_seqlens is not None
        lengths = [end - start for start, end in pairwise(cu_seqlens)]
        added: list[dict[str, Any]] = [{}] * len(lengths)
        if kept.bias is not None:
            added = [{"key_bias": bias[None]} for bias in kept.bias]
        rows = zip(keys, values, added, *(part.split(lengths, dim=1) for part in queries), strict=True)
        return [self.attend(q, key[None], value[None], *s, **more) for key, value, more, q, *s in rows]

    def output(self, x: Tensor, o: Tensor) -> Tensor:
        """The mixer's outputs ``[B, T, D]`` from what the heads read ``[B, T, H, V]``: gate and last projection."""
        if self.gate is not None:  # of each channel or, broadcast, of each head
            o = o * self.gate(x).sigmoid().unflatten(-1, (o.shape[2], -1))
        return self.out_proj(rearrange(o, "b t h v -> b t (h v)"))

    def keep(self, cache: Any, k: Tensor, v: Tensor, place: Place) -> tuple[Kept, Any]:
        """The keys and values held and new, and the cache after them; packed ones from an empty cache are one call."""
        window, sinks, cu_seqlens = self.cache_window, self.sink_tokens, place.cu_seqlens
        if cu_seqlens is None:
            start = cache.first_held(window)
            keys, values, cache = kv_cache.extend(cache, k, v, window, sinks)
            return Kept(place, keys, values, start, window), cache
        if not cache.length:
            keys, values, cache = kv_cache.begin_packed(cache, k, v, cu_seqlens, window, sinks)
            return Kept(place, keys, values, None, window), cache
        rows = kv_cache.extend_packed(cache, k, v, cu_seqlens, window, sinks)
        return Kept(place, rows[0], rows[1], None, window), rows[2]

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> Any:
        like = first_tensor(self)
        device, dtype = device or like.device, dtype or like.dtype
        heads, *widths = self.cache_shape
        shape = (batch_size, self._held(max_length), heads)
        keys, values = (torch.zeros(*shape, width, device=device, dtype=dtype) for width in widths)
        conv = self.short_conv
        return AttentionState(
            None if conv is None else conv.init_state(batch_size, device, dtype), KVCache(keys, values, 0)
        )

    def _held(self, length: int) -> int:
        return length if self.cache_window is None else min(length, self.cache_window)

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        """Bytes after ``length`` tokens, of equally long rows (rows of different lengths add 8 bytes each).

        A state made with ``max_length`` has ``state_bytes(max_length)`` from the start.
        """
        heads, keys, values = self.cache_shape
        conv = self.init_state(batch_size, 0, "meta").conv
        width = heads * (keys + values) * first_tensor(self).element_size()
        return batch_size * self._held(length) * width + measured_state_bytes(conv)


class CachedAttention(CacheMixer):
    """Projections and positions of an attention by heads; a subclass decides in :meth:`attend` which keys are seen."""

    kept_parts = ("qkv_proj.conv", "query_norm", "key_norm", "gate")

    @property
    def projected(self) -> int:
        """How many of queries, keys and values it projects to."""
        return 3

    @from_options
    def __init__(self, config: CachedAttentionConfig):
        super().__init__(config)
        heads, kv_heads, width = config.heads, config.kv_heads, config.head_width
        parts = [(heads, width), (kv_heads, width), (kv_heads, width)][: self.projected]
        self.qkv_proj = self.projection(parts)
        self.query_norm = _norm(config, heads)
        self.key_norm = _norm(config, kv_heads) if self.projected > 1 else nn.Identity()
        gates = heads if config.output_gate_scope == "head" else heads * width
        self.gate = Linear(config.d_model, gates, bias=False) if config.output_gate else None
        self.out_proj = Linear(heads * width, config.d_model, bias=config.output_bias)
        self.cache_shape = (kv_heads, width, width)

    def projection(self, parts: list[tuple[int, int]]) -> HeadProjection:
        """What makes queries, keys and values of these heads and widths."""
        return HeadProjection(self.config.d_model, parts, self.config.conv_width, bias=self.config.qkv_bias)

    def head_maps(self) -> list[HeadMap]:
        out = HeadMap("o", "out_proj", self.config.heads, self.config.head_width)
        return [*self.qkv_proj.head_maps("qkv_proj"), out]

    def project_heads(
        self, x: Tensor, conv: Tensor | None, cu_seqlens: Boundaries
    ) -> tuple[list[Tensor], Tensor | None]:
        """Queries, keys and values before norms and positions, and the short convolution's state."""
        return self.qkv_proj(x, conv, cu_seqlens)

    def project(self, x: Tensor, conv: Tensor | None, place: Place) -> tuple[list[Tensor], Tensor | None]:
        parts, conv = self.project_heads(x, conv, place.cu_seqlens)
        norms, config = (self.query_norm, self.key_norm), self.config
        turned = [norm(part) for norm, part in zip(norms, parts, strict=False)]  # a taker has queries alone
        parts = [*turned, *parts[2:]]
        if config.qkv_clip is not None:
            parts = [part.clamp(-config.qkv_clip, config.qkv_clip) for part in parts]
        if config.position == "rotary":
            tables = rotary_tables(place.positions, config.rotary_width, config.rotary_base, config.scaling)
            parts = [*(rotate(part, tables) for part in parts[:2]), *parts[2:]]
        return parts, conv


def _norm(config: CachedAttentionConfig, heads: int) -> nn.Module:
    """Of the queries or keys of so many heads."""
    if not config.qk_norm:
        return nn.Identity()
    if config.qk_norm_scope == "all":
        return AllHeadsNorm(heads * config.head_width, config.norm_eps, weights_of(config.zero_centred_norms))
    return HeadNorm(config.head_width, config.norm_eps, weights_of(config.zero_centred_norms))


def _check_cache(cache: KVCache | SmallCache, rows: int, cache_window: int | None) -> None:
    """Raise where only the cache itself shows it: rows of packed sequences, or keys that a shorter cache has lost."""
    if cache.rows != rows:
        raise ValueError(f"attention: the state has {cache.rows} rows, the call {rows} sequences")
    if cache.capacity < cache.held(cache_window):
        raise ValueError(
            f"attention: the state holds {cache.capacity} keys, expected {cache.held(cache_window)}: another mixer's?"
        )


def _positions(cache: KVCache | SmallCache, x: Tensor, cu_seqlens: Boundaries) -> Tensor:
    """``[1, T]`` where all rows are equally long, whose rotation is computed once for the batch; else ``[B, T]``."""
    before = cache.lengths()
    if cu_seqlens is not None:
        before = before.expand(len(cu_seqlens) - 1)
    return token_positions(before, x.shape[1], cu_seqlens)[0]


def _longest(x: Tensor, cu_seqlens: Boundaries) -> int:
    return x.shape[1] if cu_seqlens is None else max(end - start for start, end in pairwise(cu_seqlens))
