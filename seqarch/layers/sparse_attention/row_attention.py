"""The base of attentions with several caches: packed sequences one after the other, each with its row of the state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqarch.layers.mixer import Boundaries, Device, Mixer, first_tensor
from seqarch.layers.modules import kv_cache
from seqarch.layers.modules.kv_cache import KVCache
from seqarch.layers.modules.rotary import rotary_tables, rotate
from seqarch.layers.rows import select
from seqarch.ops.dispatch import checks


class CacheShape(NamedTuple):
    """The shape of a :class:`KVCache` after some number of tokens.

    Attributes:
        held: keys of each row.
        heads, key_width, value_width: their shape.
        cache_window: the most keys that it holds; ``None`` for no bound.
        wide: whether it is never narrower than float32.
    """

    held: int
    heads: int
    key_width: int
    value_width: int
    cache_window: int | None = None
    wide: bool = False


class PackedRows(NamedTuple):
    """The states of packed sequences, of one row each."""

    rows: tuple[Any, ...]

    @property
    def row_count(self) -> int:
        return len(self.rows)

    def select_rows(self, index: list[int]) -> Any:
        return PackedRows(tuple(select(self.rows[i], [0]) for i in index)) if index else select(self.rows[0], [])

    def one_by_one(self) -> Sequence[Any]:
        """As :func:`seqarch.layers.rows.join_rows` takes them."""
        return self.rows


RowMix = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""The outputs and the state of rows, of their inputs and their state before; rows start together or, after sequences
of different lengths, end together."""


def positions(x: Tensor, before: int, start: Tensor | None) -> Tensor:
    """Places of tokens ``x [B, T, ...]`` in their rows: ``[1, T]``, or ``[B, T]`` after the padding ``start [B]``."""
    at = torch.arange(before, before + x.shape[1], device=x.device)[None]
    return at if start is None else at - start[:, None]


class RowAttention(Mixer):
    """An attention whose state is a named tuple ``State`` of :class:`KVCache`.

    A packed call runs each sequence for itself and returns their states as they are; the next call brings them into
    rows, if it is not packed itself. States made with ``max_length`` are written in place while autograd is off.
    """

    State: Any

    @abstractmethod
    def caches(self, length: int) -> list[CacheShape]:
        """The shape of each cache after ``length`` tokens."""

    def in_rows(self, mix_rows: RowMix, x: Tensor, state: Any, cu_seqlens: Boundaries) -> tuple[Tensor, Any]:
        """As :meth:`mix`, by calls of ``mix_rows``: one for all rows, or one for each packed sequence."""
        if cu_seqlens is None:
            return mix_rows(x, self.join(state.rows) if isinstance(state, PackedRows) else state)
        states = state.rows if isinstance(state, PackedRows) else self.split(state)
        pieces = x.split([end - start for start, end in pairwise(cu_seqlens)], dim=1)
        outputs, after = zip(*map(mix_rows, pieces, states), strict=True)
        return torch.cat(outputs, dim=1), PackedRows(after)

    def check_state(self, state: Any, rows: int) -> None:
        if type(state) is not PackedRows:
            return super().check_state(state, rows)
        if state.row_count != rows:
            raise ValueError(f"{type(self).__name__}: the state has {state.row_count} rows, the call {rows} sequences")
        for part in state.rows:
            super().check_state(part, 1)

    def split(self, state: Any) -> list[Any]:
        """A state of one row for each row, without padding."""
        cache_windows = [shape.cache_window for shape in self.caches(0)]
        fields = (kv_cache.split_rows(*each) for each in zip(state, cache_windows, strict=True))
        return [self.State(*row) for row in zip(*fields, strict=True)]

    def join(self, states: Any) -> Any:
        """The rows of several states of one row."""
        cache_windows = [shape.cache_window for shape in self.caches(0)]
        return self.State(*map(kv_cache.join_rows, zip(*states, strict=True), cache_windows))

    def rotate(self, *heads: Tensor, at: Tensor) -> list[Tensor]:
        """Keys and queries ``[B, T, H, K]`` of one K, turned to positions ``at [1 or B, T]`` where there are any."""
        if self.config.position == "none":
            return list(heads)
        width = int(self.config.rotary_fraction * heads[0].shape[-1])
        tables = rotary_tables(at, width, self.config.rotary_base, self.config.scaling)
        return [rotate(each, tables) for each in heads]

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> Any:
        like = first_tensor(self)
        device, dtype = device or like.device, dtype or like.dtype
        caches = []
        for held, heads, key_width, value_width, _, wide in self.caches(max_length):
            kind = checks.accumulation_dtype(like.new_empty(0, dtype=dtype)) if wide else dtype
            shapes = ((batch_size, held, heads, width) for width in (key_width, value_width))
            keys, values = (torch.zeros(shape, device=device, dtype=kind) for shape in shapes)
            caches.append(KVCache(keys, values, 0))
        return self.State(*caches)

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        """Bytes after ``length`` tokens, of equally long rows (rows of different lengths add 8 bytes per cache each).

        A state made with ``max_length`` has ``state_bytes(max_length)`` from the start.
        """
        like = first_tensor(self)
        numbers = {False: 0, True: 0}
        for held, heads, key_width, value_width, _, wide in self.caches(length):
            numbers[wide] += held * heads * (key_width + value_width)
        wide_bytes = numbers[True] * checks.accumulation_dtype(like).itemsize
        return batch_size * (numbers[False] * like.element_size() + wide_bytes)
