"""Launches the Triton kernels of softmax attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from seqarch.ops.attention import kernels
from seqarch.ops.attention.inputs import AttentionInputs
from seqarch.ops.attention.operators import empty_outputs
from seqarch.ops.triton import launch
from seqarch.ops.triton.autotune import Configuration
from seqarch.ops.triton.launch import Tuned, block, combine, heads_of, persistent, products, strides

Bounds = tuple[tuple[int, int, int, int], ...]

FEW = 16
"""Queries of a sequence up to which its keys are split among programs."""


@dataclass(frozen=True)
class Tables:
    """Where sequences and tiles lie, as int64 tensors on the device; see ``kernels``."""

    bounds: Tensor
    queries: Tensor
    keys: Tensor

    @classmethod
    @functools.lru_cache(maxsize=32)
    def of(cls, bounds: Bounds, query_tile: int, key_tile: int, device: torch.device) -> Tables:
        """Tables of sequences whose queries and keys begin and end there."""
        queries = [(n, row) for n, each in enumerate(bounds) for row in range(*each[:2], query_tile)]
        keys = [(n, row) for n, each in enumerate(bounds) for row in range(*each[2:], key_tile)]
        keys.reverse()  # the first keys are seen by most, the last queries see most
        tables = (torch.tensor(table, dtype=torch.int64).view(-1, 2) for table in (queries, keys))
        return cls(torch.tensor(bounds, dtype=torch.int64).to(device), *(table.to(device) for table in tables))


@dataclass(frozen=True)
class Tiles:
    """How large tiles are: those that programs hold, and the configurations of the loops over what these meet."""

    queries: int
    keys: int
    forward: tuple[Configuration, ...]
    query_gradients: tuple[Configuration, ...]
    key_gradients: tuple[Configuration, ...]


def tiles(width: int, wide: bool) -> Tiles:
    """For heads up to this width, in float32 (``wide``) or 16 bits.

    First configurations are such that threads keep to their registers on 8.0 and 9.0, or nearly do
    (tests/data/triton_resources.json).
    """

    def choices(name: str, *each: tuple[int, int, int]) -> tuple[Configuration, ...]:
        return tuple(Configuration(warps, stages, {name: size}) for size, warps, stages in each)

    if wide and width > 64:
        few = 32 if width <= 128 else 16
        return Tiles(few, 16, *(choices(name, (16, 8, 1)) for name in ("BT", "BT", "BQ")))
    if wide:
        return Tiles(64, 32, choices("BT", (32, 8, 1)), choices("BT", (32, 8, 1)), choices("BQ", (16, 8, 1)))
    if width > 128:
        return Tiles(32, 32, *(choices(name, (32, 8, 2), (32, 8, 1)) for name in ("BT", "BT", "BQ")))
    backward = (32, 8, 2), (64, 8, 2)
    forward = ((32, 8, 3), (64, 8, 2), (128, 8, 2)) if width > 64 else ((64, 8, 2), (64, 4, 2), (128, 8, 2))
    return Tiles(128, 64, choices("BT", *forward), choices("BT", *backward), choices("BQ", *backward))


def split_tiles(rows: int, width: int, wide: bool) -> tuple[int, int, tuple[Configuration, ...]]:
    """Where keys are split: rows of a program, keys that it reads at a time, and configurations, as of ``tiles``."""
    warps = 4 if width <= 128 else 8
    BQ, BT = (16, 32 if width <= 128 else 16) if wide else (block(rows, 32), 64 if width <= 128 else 32)
    return BQ, BT, (Configuration(warps, 3), Configuration(warps, 2), Configuration(12 - warps, 2))


class Attention:
    """One call: its sizes, tables and dtypes. ``q, k, v`` are of one dtype, ``key_bias`` of that of sums."""

    def __init__(self, inputs: AttentionInputs):
        q, k, v, offsets = inputs.q, inputs.k, inputs.v, inputs.offsets
        batch, self.queries, self.heads, K = q.shape
        self.keys, self.groups, V = v.shape[1:]
        self.inputs, self.q, self.k, self.v = inputs, heads_of(q), heads_of(k), heads_of(v)
        if offsets is None:
            self.bounds: Bounds = ((0, self.queries, 0, self.keys),) * batch
        else:
            self.bounds = tuple((start, end, start, end) for start, end in pairwise(offsets))
        self.tiles = tiles(max(K, V), v.dtype.itemsize > 2)
        self.packed, self.shared = offsets is not None, self.heads // max(1, self.groups)
        self.start, self.scale, self.window = inputs.key_start, float(inputs.scale), min(inputs.window, self.keys)
        self.strides = strides(self.packed, self.q, self.k, self.v)
        self.bias = None if inputs.key_bias is None else inputs.key_bias.contiguous()
        flags = {"CAUSAL": inputs.causal, "WINDOWED": inputs.window > 0, "START": self.start is not None}
        flags["BIAS"] = self.bias is not None
        self.constants = {"K": K, "V": V, "BK": block(K, 256), "BV": block(V, 256)} | flags | products(v.dtype)

    @functools.cached_property
    def tables(self) -> Tables:
        return Tables.of(self.bounds, self.tiles.queries, self.tiles.keys, self.v.device)

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Arguments of kernels that say where sequences lie and which keys are seen."""
        bounds = self.tables.bounds
        return bounds, bounds if self.start is None else self.start, self.scale, self.window

    @property
    def read(self) -> tuple[Tensor, ...]:
        """What every kernel reads; in the place of what is not added to scores, anything."""
        return self.q, self.k, self.v, self.v if self.bias is None else self.bias

    def _rows(self, count: int) -> int:
        """How far the rows of one sequence are from those of the next, in what kernels write."""
        return 0 if self.packed else count

    def forward(self) -> tuple[Tensor, Tensor]:
        """``o [B, Tq, H, V]``, and ``[B, Tq, H]`` the logarithms of the softmax's sums."""
        if self.queries <= FEW and not self.packed:
            return self._forward_split()
        o, log_sum = empty_outputs(self.inputs)
        launch.launch(
            Tuned(kernels.attend, self.tiles.forward), self._programs(self.tables.queries, self.heads),
            *self.read, o, log_sum, self.tables.queries, *self.numbers, self._rows(self.queries), self._rows(self.keys),
            *self.strides, self.groups, self.heads, BQ=self.tiles.queries, **self.constants,
        )  # fmt: skip
        return o, log_sum

    def _forward_split(self) -> tuple[Tensor, Tensor]:
        """``forward`` by programs that share out the keys of each sequence, as many as fill the device."""
        o, log_sum = empty_outputs(self.inputs)
        rows, width = self.queries * self.shared, max(self.q.shape[3], self.v.shape[3])
        BQ, BT, configurations = split_tiles(rows, width, o.dtype.itemsize > 2)
        BT = BT if self.bias is None else min(BT, 32)  # with a bias of each row and key, more has no registers
        seen = min(self.keys, self.queries + self.window - 1) if self.window else self.keys
        programs, blocks = o.shape[0] * self.groups * triton.cdiv(rows, BQ), max(1, triton.cdiv(seen, BT))
        reach = triton.cdiv(blocks, max(1, persistent(programs * blocks, o.device) // max(1, programs)))
        parts = triton.cdiv(blocks, reach)
        each, sums = (o, log_sum) if parts == 1 else (log_sum.new_empty(parts * x.numel()) for x in (o, log_sum))
        launch.launch(
            Tuned(kernels.attend_split, configurations), programs * parts,
            *self.read, each, sums, log_sum if self.start is None else self.start, self.scale, self.window,
            self.queries, self.keys, self.shared, parts, reach * BT, *self.strides, self.groups,
            BQ=BQ, BT=BT, WHOLE=parts == 1, **self.constants,
        )  # fmt: skip
        if parts > 1:
            combine(each, sums, None, o, log_sum, parts, self.shared)
        return o, log_sum

    def differentiate(
        self, o: Tensor, log_sum: Tensor, do: Tensor, dlse: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of q, k, v and what is added to scores (without elements where nothing is).

        From those of o and, if any, of the logarithms of the softmax's sums.
        """
        do, queries, keys = heads_of(do), self._rows(self.queries), self._rows(self.keys)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (self.q, self.k, self.v))
        between = torch.empty_like(log_sum)
        dbias = log_sum.new_empty(0) if self.bias is None else torch.empty_like(self.bias)
        sizes = (*self.strides, *strides(self.packed, do), self.groups, self.heads)
        launch.launch(
            Tuned(kernels.query_gradients, self.tiles.query_gradients), self._programs(self.tables.queries, self.heads),
            *self.read, o, do, log_sum, log_sum if dlse is None else dlse, dq, between,
            self.tables.queries, *self.numbers, queries, keys, *sizes, BQ=self.tiles.queries, LSE=dlse is not None,
            **self.constants,
        )  # fmt: skip
        launch.launch(
            Tuned(kernels.key_gradients, self.tiles.key_gradients), self._programs(self.tables.keys, self.groups),
            *self.read, do, log_sum, between, dk, dv, dv if self.bias is None else dbias, self.tables.keys,
            *self.numbers, queries, keys, *sizes, BT=self.tiles.keys, **self.constants,
        )  # fmt: skip
        return dq, dk, dv, dbias

    def _programs(self, table: Tensor, heads: int) -> int:
        return table.shape[0] * heads
