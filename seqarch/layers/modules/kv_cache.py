"""The keys and values that attention carries from call to call.

Rows of different lengths end together: they are aligned to the right, and ``start`` says where each begins.

``cache_window`` bounds how many keys of each row are held, those of its first ``sink_tokens`` and otherwise the last (a
window of w needs w - 1 earlier keys); ``None`` holds all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from seqarch.layers.modules.coded_cache import SmallCache


class KVCache(NamedTuple):
    """The keys and values of a batch, one row per sequence.

    Attributes:
        keys, values: ``[B, capacity, G, K]`` and ``[B, capacity, G, V]``, of which the first
            ``min(length, cache_window)`` are in use.
        length: tokens of the longest row so far, those no longer held included.
        start: ``[B]``, how many of ``length`` are padding before each row; ``None`` when the rows are equally long.
    """

    keys: Tensor
    values: Tensor
    length: int
    start: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.keys.shape[0]

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def held(self, cache_window: int | None) -> int:
        return self.length if cache_window is None else min(self.length, cache_window)

    def lengths(self) -> Tensor:
        """Tokens that each row has seen: ``[B]``, or ``[1]`` when the rows are equally long."""
        if self.start is None:
            return torch.full((1,), self.length, device=self.keys.device)
        return self.length - self.start

    def first_held(self, cache_window: int | None) -> Tensor | None:
        """``[B]``, the first held key of each row that is not padding."""
        return None if self.start is None else (self.start - (self.length - self.held(cache_window))).clamp(min=0)

    def in_use(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, length, G, K]``, of a cache that holds all."""
        return self.keys[:, : self.length].to(dtype), self.values[:, : self.length].to(dtype)

    def as_rows(self) -> KVCache:
        """Itself; a :class:`PackedKV` has a form of its own."""
        return self

    def joined(self, others: Sequence[KVCache]) -> KVCache:
        """Its rows and then those of the others (:func:`seqarch.layers.rows.join_rows`), right-aligned: a copy.

        What a row holds ends where the keys in use do; a cache that has seen more than its capacity is full. There is
        room for as much as in the roomiest of them, also where that has no rows.
        """
        keys, values, lengths = [], [], []
        caches = self, *others
        for cache in caches:
            held = min(cache.length, cache.capacity)
            starts = [0] * len(cache.keys) if cache.start is None else cache.start.tolist()
            for row, start in enumerate(starts):
                used = slice(held - min(held, cache.length - start), held)
                keys.append(cache.keys[row, used].to(self.keys.dtype))
                values.append(cache.values[row, used].to(self.values.dtype))
                lengths.append(cache.length - start)
        if not lengths:
            return self
        return right_aligned(keys, values, lengths, None, max(cache.capacity for cache in caches))


class PackedKV(NamedTuple):
    """Keys and values as a packed call computed them: copied into rows only if another call follows.

    Attributes:
        keys, values: ``[1, T, G, K]`` and ``[1, T, G, V]``.
        cu_seqlens: boundaries of the sequences.
        cache_window, sink_tokens: what the rows that they become are to hold, as above.
    """

    keys: Tensor
    values: Tensor
    cu_seqlens: tuple[int, ...]
    cache_window: int | None = None
    sink_tokens: int = 0

    @property
    def row_count(self) -> int:
        return len(self.cu_seqlens) - 1

    def select_rows(self, index: list[int]) -> KVCache | PackedKV:
        """Some of the sequences, copied (:func:`seqarch.layers.rows.state_rows`)."""
        if not index:
            keys, values = (x.new_empty(0, 0, *x.shape[2:]) for x in (self.keys, self.values))
            return KVCache(keys, values, 0)
        lengths = [self.cu_seqlens[i + 1] - self.cu_seqlens[i] for i in index]
        pieces = [slice(self.cu_seqlens[i], self.cu_seqlens[i + 1]) for i in index]
        keys, values = (torch.cat([x[:, piece] for piece in pieces], dim=1) for x in (self.keys, self.values))
        return self._replace(keys=keys, values=values, cu_seqlens=tuple(accumulate(lengths, initial=0)))

    def as_rows(self, capacity: int = 0) -> KVCache:
        """One row per sequence, right-aligned."""
        lengths = [end - start for start, end in pairwise(self.cu_seqlens)]
        pieces = self.keys[0].split(lengths), self.values[0].split(lengths)
        return right_aligned(*pieces, lengths, self.cache_window, capacity, self.sink_tokens)


def right_aligned(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: list[int],
    cache_window: int | None,
    capacity: int = 0,
    sink_tokens: int = 0,
) -> KVCache:
    """A cache from each row's last keys ``[held, G, K]`` and values, with room for at least ``capacity``.

    Args:
        lengths: tokens that each row has seen, those no longer held included.
    """

    def rows(pieces: Sequence[Tensor]) -> Tensor:
        pieces = [_held(piece[None], cache_window, sink_tokens)[0] for piece in pieces]
        stacked = pad_sequence(list(pieces), batch_first=True, padding_side="left")
        return F.pad(stacked, (0, 0, 0, 0, 0, max(0, capacity - stacked.shape[1])))

    longest = max(lengths)
    padding = [longest - length for length in lengths]
    start = torch.tensor(padding, device=keys[0].device) if any(padding) else None
    return KVCache(rows(keys), rows(values), longest, start)


AnyCache = TypeVar("AnyCache", KVCache, "SmallCache")
"""Of keys and values, or of their codes (:mod:`seqarch.layers.modules.coded_cache`)."""


def split_rows(cache: AnyCache, cache_window: int | None) -> list[AnyCache]:
    """Each row as a cache of its own, without padding: views. For caches of the last keys alone."""
    if not isinstance(cache, KVCache):
        return cache.split_by(lambda part: split_rows(part, cache_window))
    starts, lengths = [0] * len(cache.keys), [cache.length] * len(cache.keys)
    if (first := cache.first_held(cache_window)) is not None:
        starts, lengths = first.tolist(), cache.lengths().tolist()
    return [
        KVCache(cache.keys[i : i + 1, start:], cache.values[i : i + 1, start:], length)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def join_rows(rows: Sequence[AnyCache], cache_window: int | None) -> AnyCache:
    """The caches of one row each as one, right-aligned, with room for as much as the longest."""
    if not isinstance(rows[0], KVCache):
        return rows[0].joined_by(lambda parts: join_rows(parts, cache_window), rows[1:])
    plain: Sequence[Any] = rows
    held = [(row.keys[0, : row.held(cache_window)], row.values[0, : row.held(cache_window)]) for row in plain]
    keys, values = zip(*held, strict=True)
    return right_aligned(keys, values, [row.length for row in rows], cache_window, max(row.capacity for row in rows))


def extend(
    cache: AnyCache, k: Tensor, v: Tensor, cache_window: int | None, sink_tokens: int = 0
) -> tuple[Tensor, Tensor, AnyCache]:
    """Append ``k: [B, T, G, K]`` and ``v`` to every row: all held keys and values, old and new, and the cache after.

    Those come back in the dtypes of k and v, whatever the cache holds.
    """
    if not isinstance(cache, KVCache):
        return cache.extended(k, v, cache_window, sink_tokens)
    length = cache.length + k.shape[1]
    if not cache.capacity:
        start = cache.start
        new_keys, new_values = (_held(x, cache_window, sink_tokens, start) for x in (k, v))
        return k, v, KVCache(new_keys, new_values, length, start)
    held = cache.held(cache_window)
    end = held + k.shape[1]
    if end <= cache.capacity:
        keys, values = _write(cache.keys, k, held), _write(cache.values, v, held)
        after = KVCache(keys, values, length, cache.start)
        return keys[:, :end].to(k.dtype), values[:, :end].to(v.dtype), after
    keys = torch.cat([cache.keys[:, :held], k], dim=1)
    values = torch.cat([cache.values[:, :held], v], dim=1)
    start = cache.first_held(cache_window)
    held_keys, held_values = (_held(x, cache_window, sink_tokens, start) for x in (keys, values))
    return keys.to(k.dtype), values.to(v.dtype), KVCache(held_keys, held_values, length, cache.start)


def _held(x: Tensor, cache_window: int | None, sink_tokens: int, start: Tensor | None = None) -> Tensor:
    """The part of ``x [B, T, ...]`` that is held, as a tensor of its own: a view would hold the memory of all others.

    Args:
        start: ``[B]``, where each row begins in x; ``None`` for 0.
    """
    if cache_window is None or x.shape[1] <= cache_window:
        return x
    dropped = x.shape[1] - cache_window
    last = x[:, dropped + sink_tokens :]
    if not sink_tokens:
        return last.clone()
    if start is None:
        return torch.cat([x[:, :sink_tokens], last], dim=1)
    # a row no longer than ``cache_window`` loses its padding alone
    at = start.clamp(max=dropped)[:, None] + torch.arange(sink_tokens, device=x.device)
    return torch.cat([x[torch.arange(len(x), device=x.device)[:, None], at], last], dim=1)


def _write(buffer: Tensor, x: Tensor, at: int) -> Tensor:
    """``buffer`` with ``x`` at a time: in place, except where autograd may still need what was there."""
    end = at + x.shape[1]
    if torch.is_grad_enabled() or buffer.requires_grad:
        return torch.cat([buffer[:, :at], x.to(buffer.dtype), buffer[:, end:]], dim=1)
    buffer[:, at:end] = x
    return buffer


def begin_packed(
    cache: AnyCache, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], cache_window: int | None, sink_tokens: int = 0
) -> tuple[Tensor, Tensor, AnyCache | PackedKV]:
    """Packed ``k: [1, T, G, K]`` and ``v`` of sequences that begin: as they are read, and the cache after them.

    They are copied into rows where room was reserved.
    """
    if not isinstance(cache, KVCache):
        return cache.begun_packed(k, v, cu_seqlens, cache_window, sink_tokens)
    packed, reserved = PackedKV(k, v, cu_seqlens, cache_window, sink_tokens), cache.capacity
    return k, v, packed.as_rows(reserved) if reserved else packed


def extend_packed(
    cache: AnyCache, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], cache_window: int | None, sink_tokens: int = 0
) -> tuple[list[Tensor], list[Tensor], AnyCache]:
    """Append packed ``k: [1, T, G, K]`` and ``v``, sequence i to row i.

    Returns:
        each row's keys and values, ``[held and new, G, K]``, and the cache after.
    """
    if not isinstance(cache, KVCache):
        return cache.extended_packed(k, v, cu_seqlens, cache_window, sink_tokens)
    added = [end - start for start, end in pairwise(cu_seqlens)]
    start = cache.first_held(cache_window)
    starts = [0] * len(added) if start is None else start.tolist()
    seen = cache.lengths().expand(len(added)).tolist()
    held = cache.held(cache_window)

    def join(rows: Tensor, new: Tensor) -> list[Tensor]:
        old = rows[:, :held].unbind()
        return [torch.cat([old[i][starts[i] :], piece]) for i, piece in enumerate(new[0].split(added))]

    keys, values = join(cache.keys, k), join(cache.values, v)
    lengths = [before + new for before, new in zip(seen, added, strict=True)]
    after = right_aligned(keys, values, lengths, cache_window, cache.capacity, sink_tokens)
    return [key.to(k.dtype) for key in keys], [value.to(v.dtype) for value in values], after


def replace_keys(
    cache: KVCache | PackedKV, keys: Tensor | Sequence[Tensor], cu_seqlens: tuple[int, ...] | None
) -> KVCache | PackedKV:
    """A cache of all tokens with other keys in the place of those in use, after the call that appended the last.

    Args:
        keys: ``[B, length, G, K]``; of packed sequences ``[1, T, G, K]`` where they begin, else those of each.
        cu_seqlens: of that call.
    """
    if isinstance(cache, PackedKV):
        return cache._replace(keys=keys)
    if isinstance(keys, Tensor) and cu_seqlens is None:
        keys = keys.to(cache.keys.dtype)
        return cache._replace(keys=keys if keys.shape == cache.keys.shape else _write(cache.keys, keys, 0))
    if isinstance(keys, Tensor):
        assert cu_seqlens is not None
        keys = keys[0].split([end - start for start, end in pairwise(cu_seqlens)])
    rows = pad_sequence(list(keys), batch_first=True, padding_side="left")
    rows = F.pad(rows, (0, 0, 0, 0, 0, cache.capacity - rows.shape[1]))
    return cache._replace(keys=rows.to(cache.keys.dtype))
