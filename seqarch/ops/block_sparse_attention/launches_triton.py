"""Launches the Triton kernels of attention over listed blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from seqarch.ops.block_sparse_attention import kernels
from seqarch.ops.block_sparse_attention.inputs import ListInputs
from seqarch.ops.triton import launch
from seqarch.ops.triton.autotune import Configuration
from seqarch.ops.triton.launch import Tuned, block, combine, heads_of, persistent, products, strides

WORKSPACE = 2**28
"""Numbers of what pairs hold at a time; heads of keys take turns if together they would need more."""


@dataclass(frozen=True)
class Order:
    """In which order pairs are met, on the device; see ``kernels``. No field's shape depends on the data."""

    order: Tensor
    tiles: Tensor
    runs: Tensor
    ends: Tensor

    @classmethod
    def as_listed(cls, pairs: int, device: torch.device) -> Order:
        """Each pair its own tile, for outputs alone: of one query per row, next to none name the same block."""
        places = torch.arange(pairs + 1, device=device)
        return cls(places, places, places[:0], places[-1:])

    @classmethod
    def by_block(cls, entries: Tensor, first: Tensor, block_size: int, keys: int, groups: int, per_tile: int) -> Order:
        """Sorted, from plain lists ``[B, Tq, I, S]``, in tiles of so many pairs at most."""
        batch, _, lists, _ = entries.shape
        row = torch.arange(batch, device=entries.device)[:, None] * groups
        group = torch.arange(lists, device=entries.device) // (lists // groups)
        starts = (first[..., None] + (row + group)[:, None] * keys)[..., None] + (entries >> 1) * block_size
        none = batch * groups * keys
        names = torch.where(entries >= 0, starts, none).flatten()
        names, order = names.to(torch.int32 if none < 2**31 else torch.int64).sort(stable=True)
        place = torch.arange(len(names), device=names.device)
        fresh = torch.cat([place.new_ones(1, dtype=torch.bool), names[1:] != names[:-1]])
        inside = place - torch.where(fresh, place, 0).cummax(0).values
        valid = names < none
        count = valid.sum()
        most = min(len(names), none), min(len(names), len(names) // per_tile + none)
        (runs, some), (tiles, all_) = (
            _places(flags, many, count)
            for flags, many in zip((fresh & valid, valid & (inside % per_tile == 0)), most, strict=True)
        )
        return cls(order, tiles, runs, torch.stack([all_, some]))


def _places(flags: Tensor, most: int, end: Tensor) -> tuple[Tensor, Tensor]:
    """Where flags stand, at most so many, followed by the end; and how many there are."""
    numbers = flags.cumsum(0)
    places = torch.searchsorted(numbers, torch.arange(1, most + 2, device=flags.device))
    return torch.minimum(places, end), numbers[-1]


def parts(inputs: ListInputs, width: int) -> Iterator[tuple[Part, slice, slice, slice]]:
    """Rows of the batch and heads that are computed together; and which rows, heads of q and heads of k these are.

    Args:
        inputs: of one dtype.
        width: numbers of what each pair holds.
    """
    batch, queries, lists, listed = inputs.lists.shape
    groups, shared = inputs.k.shape[2], inputs.q.shape[2] // lists
    each = lists // groups
    numbers = queries * listed * each * shared * width  # of one row and head of keys
    some = max(1, WORKSPACE // max(1, numbers))
    rows, heads = max(1, some // groups), min(groups, some)
    for start in range(0, batch, rows):
        row = slice(start, start + rows)
        first = inputs.first[row] if inputs.first.shape[0] > 1 else inputs.first
        for head in range(0, groups, heads):
            group = slice(head, min(head + heads, groups))
            of = slice(group.start * each, group.stop * each)
            queried = slice(of.start * shared, of.stop * shared)
            q, k, v = inputs.q[row, :, queried], inputs.k[row, :, group], inputs.v[row, :, group]
            part = Part(inputs.replace(q=q, k=k, v=v, lists=inputs.lists[row, :, of], first=first))
            yield part, row, queried, group


class Part:
    """Some rows and heads of one call, on views of its tensors."""

    def __init__(self, inputs: ListInputs):
        q, k, v, entries, first = inputs.q, inputs.k, inputs.v, inputs.lists, inputs.first
        block_size = inputs.block_size
        self.q, self.k, self.v = (heads_of(x, max(block_size, 128)) for x in (q, k, v))
        self.entries, self.first = entries.contiguous(), first.contiguous()
        (self.batch, self.queries, self.heads, self.K), (self.keys, self.groups, self.V) = q.shape, v.shape[1:]
        self.lists, self.listed = entries.shape[2:]
        self.shared, self.block_size = self.heads // self.lists, block_size
        width, narrow = max(self.K, self.V), v.dtype.itemsize == 2
        # Of a tile's queries and keys, such that threads keep to their registers.
        self.most = 16 if not narrow else 64 if width <= 128 else 32
        self.BT = block(block_size, self.most)
        self.key_tile = self.BT if width <= 64 else min(self.BT, 32)
        self.scale, self.window = float(inputs.scale), inputs.window or self.keys
        first_row = self.queries if first.shape[0] > 1 else 0
        self.sizes = (
            self.scale, self.window, first_row, self.queries, self.keys, self.listed, self.lists, self.groups,
            self.shared, block_size,
        )  # fmt: skip
        self.strides = strides(False, self.q, self.k, self.v)
        widths = {"K": self.K, "V": self.V, "BK": block(self.K, 256), "BV": block(self.V, 256)}
        self.constants = widths | {"BT": self.BT} | products(v.dtype)

    def _by_block(self) -> tuple[Order, int]:
        """The pairs sorted by block, and the rows of a tile."""
        per_tile = max(1, self.most // self.shared)
        order = Order.by_block(self.entries, self.first, self.block_size, self.keys, self.groups, per_tile)
        return order, per_tile * self.shared

    def forward(self, o: Tensor, log_sum: Tensor) -> None:
        """Write ``o [B, Tq, H, V]`` and ``log_sum [B, Tq, H]``, views of the call's."""
        pairs = self.entries.numel() * self.shared
        each, sums = self.v.new_empty(pairs, self.V), log_sum.new_empty(pairs)
        if self.queries == 1:
            order, rows = Order.as_listed(self.entries.numel(), self.entries.device), self.shared
        else:
            order, rows = self._by_block()
        BQ = block(rows, self.most)
        parts = triton.cdiv(rows, BQ)
        launch.launch(
            _tried(kernels.partial_outputs), persistent(len(order.tiles) * parts, self.v.device),
            self.q, self.k, self.v, each, sums, order.order, self.entries, self.first, order.tiles, order.ends,
            *self.sizes, parts, *self.strides, BQ=BQ, **self.constants,
        )  # fmt: skip
        whole = torch.empty(log_sum.shape, dtype=log_sum.dtype, device=log_sum.device)
        combine(each, sums, self.entries, o, whole, self.listed, self.shared)
        log_sum.copy_(whole)

    def differentiate(self, do: Tensor, log_sum: Tensor, between: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Write dq, and dk and dv, zeros so far, where keys are seen; views of the call's, as the gradient of o is."""
        do, log_sum, between = heads_of(do), log_sum.contiguous(), between.contiguous()
        each = self.q.new_empty(self.entries.numel() * self.shared, self.K)
        inputs = self.q, self.k, self.v, do, log_sum, between
        numbers = (*self.strides, *strides(False, do))
        order, rows = self._by_block()
        tables, BQ = (order.order, self.entries, self.first), block(rows, self.most)
        parts = triton.cdiv(rows, BQ)
        launch.launch(
            _tried(kernels.partial_gradients), persistent(len(order.tiles) * parts, self.v.device),
            *inputs, each, *tables, order.tiles, order.ends, *self.sizes, parts, *numbers, BQ=BQ, **self.constants,
        )  # fmt: skip
        combine(each, log_sum, self.entries, dq, log_sum, self.listed, self.shared, self.scale, weighted=False)
        dkeys, dvalues = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (self.k, self.v))
        parts = triton.cdiv(self.block_size, self.key_tile)
        launch.launch(
            _tried(kernels.block_gradients), persistent(len(order.runs) * parts, self.v.device),
            *inputs, dkeys, dvalues, *tables, order.runs, order.ends, *self.sizes, parts, *numbers,
            **self.constants | {"BQ": min(BQ, 32), "BT": self.key_tile},
        )  # fmt: skip
        dk.copy_(dkeys)
        dv.copy_(dvalues)


def _tried(kernel: object) -> Tuned:
    return Tuned(kernel, (Configuration(8, 2), Configuration(8, 3), Configuration(4, 2)))
