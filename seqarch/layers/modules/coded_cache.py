"""Keys and values as codes: each token's are written once, and every query reads what they stand for.

So what a query reads does not depend on how the sequence was split into calls. Codes and scales of keys are a
:class:`~seqarch.layers.modules.kv_cache.KVCache`, in the places of keys and values, and those of values another one:
rows, windows, padding and reserved room are those of any cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqarch.layers.modules import kv_cache
from seqarch.layers.modules.kv_cache import KVCache
from seqarch.layers.modules.positions import token_positions
from seqarch.layers.modules.state_format import Coded, StateFormat

KEYS, VALUES = 1, 2
"""What keeps the noise of a token's keys and values apart."""


class CodedCache(NamedTuple):
    """A cache of a small state, between calls.

    Attributes:
        keys, values: the codes ``[B, capacity, ...]`` of keys and of values, in the place of keys; in the place of
            values their scales, which have no width where a format has none.
    """

    keys: KVCache
    values: KVCache

    def joined_by(self, join: Callable[[Sequence[KVCache]], KVCache], others: Sequence[CodedCache]) -> CodedCache:
        """Its rows and those of the others, by what joins rows of plain caches."""
        return CodedCache(*(join(same) for same in zip(self, *others, strict=True)))


class SmallCache(NamedTuple):
    """A cache of a small state, in a call: what :class:`KVCache` is to a mixer, reading and writing codes.

    Attributes:
        keys, values: as of :class:`CodedCache`.
        form: of keys and values.
        shapes: ``(G, K)`` and ``(G, V)``.
    """

    keys: KVCache
    values: KVCache
    form: StateFormat
    shapes: tuple[torch.Size, torch.Size]

    @classmethod
    def of(cls, cache: KVCache, form: StateFormat) -> SmallCache:
        """Of a plain cache, as of a state before the first token."""
        shapes, lead = (cache.keys.shape[2:], cache.values.shape[2:]), cache.keys.shape[:2]
        places = torch.zeros(lead, dtype=torch.int64, device=cache.keys.device)
        keys, values = (_coded(form, each, places, i) for i, each in enumerate(cache[:2]))
        length, start = cache.length, cache.start
        return cls(KVCache(keys[0], keys[1], length, start), KVCache(values[0], values[1], length, start), form, shapes)

    @classmethod
    def in_call(cls, cache: CodedCache, form: StateFormat, shapes: tuple[torch.Size, torch.Size]) -> SmallCache:
        keys, values = cache
        return cls(keys, values._replace(length=keys.length, start=keys.start), form, shapes)

    @property
    def between_calls(self) -> CodedCache:
        return CodedCache(self.keys, self.values)

    @property
    def rows(self) -> int:
        return self.keys.rows

    @property
    def length(self) -> int:
        return self.keys.length

    @property
    def start(self) -> Tensor | None:
        return self.keys.start

    @property
    def capacity(self) -> int:
        return self.keys.capacity

    def held(self, cache_window: int | None) -> int:
        return self.keys.held(cache_window)

    def lengths(self) -> Tensor:
        return self.keys.lengths()

    def first_held(self, cache_window: int | None) -> Tensor | None:
        return self.keys.first_held(cache_window)

    def as_rows(self) -> SmallCache:
        return self

    def in_use(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, length, G, K]``, of a cache that holds all."""
        return self._plain(self.keys, self.length, 0, dtype), self._plain(self.values, self.length, 1, dtype)

    def extended(
        self, k: Tensor, v: Tensor, cache_window: int | None, sink_tokens: int
    ) -> tuple[Tensor, Tensor, SmallCache]:
        """As :func:`kv_cache.extend <seqarch.layers.modules.kv_cache.extend>`: what is read is what codes stand for."""
        places = token_positions(self.lengths(), k.shape[1])[0].expand(k.shape[:2])
        held = min(self.held(cache_window), self.capacity)
        read, after = [], []
        for i, (part, new) in enumerate(((self.keys, k), (self.values, v))):
            codes, scales = _coded(self.form, new, places, i)
            # a copy: what is held may be written in place
            all_codes = torch.cat([part.keys[:, :held], codes], 1)
            all_scales = torch.cat([part.values[:, :held], scales], 1)
            found = self._decoded(all_codes, all_scales, i, new.dtype)
            read.append(torch.cat([found[:, :held], _passing(found[:, held:], new)], 1) if _is_needed(new) else found)
            after.append(kv_cache.extend(part, codes, scales, cache_window, sink_tokens)[2])
        return read[0], read[1], self._replace(keys=after[0], values=after[1])

    def extended_packed(
        self, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], cache_window: int | None, sink_tokens: int
    ) -> tuple[list[Tensor], list[Tensor], SmallCache]:
        """As :func:`kv_cache.extend_packed <seqarch.layers.modules.kv_cache.extend_packed>`."""
        places = token_positions(self.lengths().expand(len(cu_seqlens) - 1), k.shape[1], cu_seqlens)[0]
        read, after = [], []
        for i, (part, new) in enumerate(((self.keys, k), (self.values, v))):
            codes, scales = _coded(self.form, new, places, i)
            rows = kv_cache.extend_packed(part, codes, scales, cu_seqlens, cache_window, sink_tokens)
            pieces, found = new[0].split([end - begin for begin, end in pairwise(cu_seqlens)]), []
            for key, value, piece in zip(rows[0], rows[1], pieces, strict=True):
                row = self._decoded(key[None], value[None], i, new.dtype)[0]
                held, now = row.split([len(row) - len(piece), len(piece)])
                found.append(torch.cat([held, _passing(now, piece)]) if _is_needed(new) else row)
            read.append(found)
            after.append(rows[2])
        return read[0], read[1], self._replace(keys=after[0], values=after[1])

    def begun_packed(
        self, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], cache_window: int | None, sink_tokens: int
    ) -> tuple[Tensor, Tensor, SmallCache]:
        """As :func:`kv_cache.begin_packed <seqarch.layers.modules.kv_cache.begin_packed>`: always in rows."""
        lengths = [end - begin for begin, end in pairwise(cu_seqlens)]
        places = token_positions(k.new_zeros(len(lengths), dtype=torch.int64), k.shape[1], cu_seqlens)[0]
        read, after = [], []
        for i, new in enumerate((k, v)):
            codes, scales = _coded(self.form, new, places, i)
            read.append(_passing(self._decoded(codes, scales, i, new.dtype), new))
            pieces = codes[0].split(lengths), scales[0].split(lengths)
            after.append(kv_cache.right_aligned(*pieces, lengths, cache_window, self.capacity, sink_tokens))
        return read[0], read[1], self._replace(keys=after[0], values=after[1])

    def joined_by(self, join: Callable[[Sequence[KVCache]], KVCache], others: Sequence[SmallCache]) -> SmallCache:
        """Its rows and those of the others, by what joins rows of plain caches."""
        caches = (self, *others)
        return self._replace(keys=join([each.keys for each in caches]), values=join([each.values for each in caches]))

    def split_by(self, split: Callable[[KVCache], list[KVCache]]) -> list[SmallCache]:
        """Its rows, by what splits a plain cache into rows."""
        parts = zip(split(self.keys), split(self.values), strict=True)
        return [self._replace(keys=keys, values=values) for keys, values in parts]

    def _plain(self, part: KVCache, held: int, number: int, dtype: torch.dtype) -> Tensor:
        return self._decoded(part.keys[:, :held], part.values[:, :held], number, dtype)

    def _decoded(self, codes: Tensor, scales: Tensor, number: int, dtype: torch.dtype) -> Tensor:
        shape = self.shapes[number]
        width = self.form.layout((1, 1, *shape), lead=2)[-1]
        coded = Coded(codes, scales if self.form.most else None, None, None)
        return self.form.decode(coded, width, dtype).reshape(*codes.shape[:2], *shape)


def _is_needed(given: Tensor) -> bool:
    """Whether gradients of new keys or values are wanted."""
    return torch.is_grad_enabled() and given.requires_grad


def _passing(found: Tensor, given: Tensor) -> Tensor:
    """What new keys or values are read as; gradients pass by the rounding."""
    return given + (found - given).detach() if _is_needed(given) else found


def _coded(form: StateFormat, x: Tensor, places: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Codes and scales ``[B, T, rows, ...]`` of keys or values ``[B, T, G, K]``."""
    sizes = form.layout(x.shape, lead=2)
    sizes = sizes if len(sizes) == 4 else (*sizes[:2], 1, sizes[-1])
    coded = form.encode(x.detach().reshape(sizes), places, (KEYS, VALUES)[number])
    none = coded.codes.new_zeros((*sizes[:3], 0), dtype=torch.int16)
    return coded.codes, none if coded.scales is None else coded.scales


def is_coded(part: Any) -> bool:
    """Whether a part of a state, or a kind of part, holds codes."""
    kind = part if isinstance(part, type) else type(part)
    return issubclass(kind, (Coded, CodedCache))
