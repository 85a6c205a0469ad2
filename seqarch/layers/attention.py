"""Softmax attention as a mixer: full, or over a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers import kv_cache
from seqarch.layers.heads import HeadProjection
from seqarch.layers.kv_cache import KVCache, PackedKV
from seqarch.layers.mixer import LayerConfig, Mixer, choose_heads, linear_flops
from seqarch.layers.norms import HeadNorm
from seqarch.layers.positions import token_positions
from seqarch.layers.rotary import rotary_tables, rotate
from seqarch.ops.attention import flops as attention_flops
from seqarch.ops.common import checks

POSITIONS = ("none", "rotary")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(LayerConfig):
    """Options of :class:`Attention`.

    Attributes:
        num_heads: H; by default heads of width 64 (32 where 64 does not divide D), or as many of width ``head_dim`` as
            fit into D.
        num_kv_heads: G, the heads of keys and values, each shared by ``H / G`` query heads; by default H.
        head_dim: K = V; by default ``D / H``.
        position: ``"rotary"`` or ``"none"``.
        rotary_base: base of the rotation's wavelengths; larger turns slower.
        qk_norm: an RMS norm with weights over each head of q and k, before the rotation.
        conv_width: width of a short convolution over queries, keys and values; 0 for none.
        window: tokens that each token sees, itself included; ``None`` for all before it.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    position: str = "rotary"
    rotary_base: float = 10000.0
    qk_norm: bool = False
    conv_width: int = 0
    window: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"num_kv_heads ({self.kv_heads}) must divide num_heads ({self.heads})")
        if self.position not in POSITIONS:
            raise checks.unknown_name("position", self.position, POSITIONS)
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head width, got {self.head_width}")

    @property
    def heads(self) -> int:
        if self.head_dim is None:
            return choose_heads(self.d_model, self.num_heads)
        heads = self.d_model // self.head_dim if self.num_heads is None else self.num_heads
        if heads < 1:
            raise ValueError(
                f"num_heads must be positive, got {heads} (d_model {self.d_model}, head_dim {self.head_dim})"
            )
        return heads

    @property
    def kv_heads(self) -> int:
        return self.heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.d_model // self.heads if self.head_dim is None else self.head_dim


class AttentionState(NamedTuple):
    """State of :class:`Attention`.

    Attributes:
        conv: the short convolution's last inputs, or ``None`` without one.
        cache: keys (rotated) and values.
    """

    conv: Tensor | None
    cache: KVCache | PackedKV


class Attention(Mixer):
    """``o_t = sum_j softmax_j(q_t . k_j / sqrt(K)) v_j`` over the tokens up to t, or the last ``window`` of them.

    Vaswani et al. 2017, "Attention Is All You Need", section 3.2, with what its successors share: no biases, rotary
    positions (Su et al. 2021, "RoFormer"), optionally grouped heads (Ainslie et al. 2023, "GQA"), normalised queries
    and keys (Henry et al. 2020, with the RMS norm of Qwen3) and a depthwise convolution after the projections (So et
    al. 2021, "Primer"). Projections have ``nn.Linear``'s initialisation, norms start at 1.

    Its state grows with the sequence. A state made with ``max_length`` is written in place while autograd is off; past
    that length it grows.
    """

    Config = AttentionConfig

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config
        heads, kv_heads, width = config.heads, config.kv_heads, config.head_width
        parts = [(heads, width), (kv_heads, width), (kv_heads, width)]
        self.heads = HeadProjection(config.d_model, parts, config.conv_width)
        self.query_norm = HeadNorm(width, eps=1e-6) if config.qk_norm else nn.Identity()
        self.key_norm = HeadNorm(width, eps=1e-6) if config.qk_norm else nn.Identity()
        self.output = nn.Linear(heads * width, config.d_model, bias=False)

    @property
    def keep(self) -> int | None:
        """Keys of earlier calls that a new token may see."""
        return None if self.config.window is None else self.config.window - 1

    def forward(
        self, x: Tensor, state: AttentionState | None = None, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, AttentionState]:
        offsets = checks.sequence_offsets("attention", cu_seqlens, x.shape[0], x.shape[1])
        conv, cache = (None, None) if state is None else state
        if cache is not None:
            cache = kv_cache.as_rows(cache, self.keep)
            _match_rows(cache, x.shape[0] if offsets is None else len(offsets) - 1)
        (q, k, v), conv = self.heads(x, conv, offsets)
        q, k = self.query_norm(q), self.key_norm(k)
        if self.config.position == "rotary":
            tables = rotary_tables(_positions(cache, x, offsets), q.shape[-1], self.config.rotary_base)
            q, k = rotate(q, tables), rotate(k, tables)
        if offsets is None:
            o, cache = self._attend(q, k, v, cache)
        else:
            o, cache = self._attend_packed(q, k, v, cache, offsets)
        return self.output(rearrange(o, "b t h v -> b t (h v)")), AttentionState(conv, cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None) -> tuple[Tensor, KVCache]:
        start = None if cache is None else cache.first_held(self.keep)
        keys, values, cache = kv_cache.extend(cache, k, v, self.keep)
        return ops.attention(q, keys, values, window=self.config.window, key_start=start), cache

    def _attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, offsets: tuple[int, ...]
    ) -> tuple[Tensor, KVCache | PackedKV]:
        window = self.config.window
        if cache is None or not cache.length:
            o = ops.attention(q, k, v, window=window, cu_seqlens=offsets)
            packed = PackedKV(k, v, offsets)
            reserved = 0 if cache is None else cache.capacity
            return o, kv_cache.as_rows(packed, self.keep, reserved) if reserved else packed
        keys, values, cache = kv_cache.extend_packed(cache, k, v, offsets, self.keep)
        queries = q.split([end - start for start, end in pairwise(offsets)], dim=1)
        rows = [
            ops.attention(row, key[None], value[None], window=window)
            for row, key, value in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(rows, dim=1), cache

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        weight = self.output.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        shape = (batch_size, self._held(max_length or 0), self.config.kv_heads, self.config.head_width)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        conv = self.heads.conv
        return AttentionState(
            None if conv is None else conv.init_state(batch_size, device, dtype), KVCache(keys, values, 0)
        )

    def _held(self, length: int) -> int:
        return length if self.keep is None else min(length, self.keep)

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        """Bytes after ``length`` tokens, of equally long rows (rows of different lengths add 8 bytes each).

        A state made with ``max_length`` has ``state_bytes(max_length)`` from the start.
        """
        width = self.config.kv_heads * self.config.head_width * self.output.weight.element_size()
        conv = self.heads.conv
        return 2 * batch_size * self._held(length) * width + (
            0 if conv is None else conv.state_bytes(length, batch_size)
        )

    def flops(self, length: int, batch_size: int = 1) -> int:
        config = self.config
        pairs = attention_flops(
            length, length, config.heads, config.head_width, config.head_width, True, config.window, batch_size
        )
        return self.heads.flops(length, batch_size) + linear_flops(self.output, batch_size * length) + pairs


def _match_rows(cache: KVCache, rows: int) -> None:
    if cache.keys.shape[0] != rows:
        raise ValueError(f"attention: the state has {cache.keys.shape[0]} rows, the call {rows} sequences")


def _positions(cache: KVCache | None, x: Tensor, offsets: tuple[int, ...] | None) -> Tensor:
    """``[1, T]`` where all rows stand alike, so that the rotation is computed once for the batch; else ``[B, T]``."""
    before = torch.zeros(1, dtype=torch.int64, device=x.device) if cache is None else cache.lengths()
    if offsets is not None:
        before = before.expand(len(offsets) - 1)
    return token_positions(before, x.shape[1], offsets)[0]


@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(AttentionConfig):
    """Options of :class:`SlidingWindow`: those of :class:`Attention` with a window that cannot be ``None``."""

    window: int | None = 128

    def __post_init__(self):
        super().__post_init__()
        if self.window is None:
            raise ValueError("window must be at least 1 here, got None: that is the mixer 'attention'")


class SlidingWindow(Attention):
    """:class:`Attention` over the last ``window`` tokens: ``O(T w)`` work and a state that stops growing.

    Beltagy et al. 2020, "Longformer", section 3.1, to the past only, as in Mistral. Not chunked local attention, whose
    blocks do not overlap.
    """

    Config = SlidingWindowConfig
