"""Multi-head latent attention (MLA): all heads' keys and values from one small vector per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.attention.base import CacheMixer, Place
from seqarch.layers.attention.options import POSITIONS
from seqarch.layers.mixer import Mixer, choose_heads
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadsConfig
from seqarch.layers.modules.linear import Linear, is_plain_linear
from seqarch.layers.modules.norms import HeadNorm
from seqarch.layers.modules.rope_scaling import RopeScaling, rope_scaling
from seqarch.layers.modules.rotary import rotary_tables, rotate
from seqarch.ops.attention import flops as attention_flops
from seqarch.ops.dispatch import checks


@dataclass(frozen=True, kw_only=True)
class MLAConfig(HeadsConfig):
    """Options of :class:`MLA`.

    Attributes:
        qk_nope_head_dim: K, channels of a head's key that come from the latents; by default ``D / H``.
        v_head_dim: V; by default K.
        qk_rope_head_dim: R, further channels of the keys that all heads share and that alone know positions; by default
            ``K / 2``.
        kv_lora_rank: C, the latents' width; by default 4 K.
        q_lora_rank: rank of the queries' map from the input, with an RMS norm inside; ``None`` for a full matrix.
        position: ``"rotary"`` or ``"none"``.
        rotary_base: base of the rotation's wavelengths; larger turns slower.
        rope_scaling: for longer sequences, as of attention; ``mscale_all_dim`` of ``"yarn"`` also scales the scores, as
            in DeepSeek-V3.
        norm_eps: added to the mean square in the norms of the latents and the low-rank queries.
    """

    size_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "qk_nope_head_dim": "keys", "kv_lora_rank": "rank"}

    head_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "v_head_dim": "values"}

    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    position: str = "rotary"
    rotary_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if self.position not in POSITIONS:
            raise checks.unknown_name("position", self.position, POSITIONS)
        if self.position == "rotary" and self.shared % 2:
            raise ValueError(f"rotary positions need an even qk_rope_head_dim, got {self.shared}")
        _ = self.scaling  # raises where it does not fit the heads

    @cached_property
    def scaling(self) -> RopeScaling | None:
        return rope_scaling(self.rope_scaling, self.position, self.rotary_base, (self.shared,))

    @property
    def scale(self) -> float:
        """Of the scores."""
        return (self.keys + self.shared) ** -0.5 * (1.0 if self.scaling is None else self.scaling.score_factor)

    @property
    def heads(self) -> int:
        return choose_heads(self.d_model, self.num_heads, self.qk_nope_head_dim)

    @property
    def keys(self) -> int:
        return self.qk_nope_head_dim or self.d_model // self.heads

    @property
    def values(self) -> int:
        return self.v_head_dim or self.keys

    @property
    def shared(self) -> int:
        return self.qk_rope_head_dim or max(1, self.keys // 2)

    @property
    def rank(self) -> int:
        return self.kv_lora_rank or 4 * self.keys


class LatentMixer(Mixer):
    """The projections of latent attention, and its two forms; a subclass says which keys each query reads."""

    config: MLAConfig

    def __init__(self, config: MLAConfig):
        super().__init__(config)
        heads, keys, values, d_model = config.heads, config.keys, config.values, config.d_model
        width = heads * (keys + config.shared)
        if config.q_lora_rank is None:
            self.query = Linear(d_model, width, bias=False)
        else:
            self.query = nn.Sequential(
                Linear(d_model, config.q_lora_rank, bias=False),
                HeadNorm(config.q_lora_rank, eps=config.norm_eps),
                Linear(config.q_lora_rank, width, bias=False),
            )
        self.compress = Linear(d_model, config.rank + config.shared, bias=False)
        self.norm = HeadNorm(config.rank, eps=config.norm_eps)
        self.expand = Linear(config.rank, heads * (keys + values), bias=False)
        self.gate = None
        self.out_proj = Linear(heads * values, d_model, bias=False)

    def head_maps(self) -> list[HeadMap]:
        """What reads the heads alone: keys and values are of one latent, and queries of two parts."""
        return [HeadMap("o", "out_proj", self.config.heads, self.config.values)]

    def latents(self, x: Tensor, q: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``[B, T, H, K + R]`` of ``q [B, T, H (K + R)]``, rotated, and latents and shared keys ``[B, T, 1, C +
        R]`` of x.
        """
        config, q = self.config, q.unflatten(-1, (self.config.heads, -1))
        latent, shared = self.compress(x).unsqueeze(2).split([config.rank, config.shared], dim=-1)
        if config.position == "rotary":
            tables = rotary_tables(positions, config.shared, config.rotary_base, config.scaling)
            own, turned = q.split([config.keys, config.shared], dim=-1)
            q, shared = torch.cat([own, rotate(turned, tables)], dim=-1), rotate(shared, tables)
        return q, torch.cat([self.norm(latent), shared], dim=-1)

    def read_latents(self, q: Tensor, entries: Tensor, attention: Callable[..., Tensor], reach: int | None) -> Tensor:
        """The outputs ``[B, Tq, H, V]`` of ``attention(q, k, v)`` in the form that takes fewer FLOPs.

        Args:
            reach: the most keys that a query reads; ``None`` for all up to its own.
        """
        absorbed = self.is_absorbed(q.shape[1], entries.shape[1], reach)
        return self._absorbed(q, entries, attention) if absorbed else attention(q, *self.expanded(entries))

    def _absorbed(self, q: Tensor, entries: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        o = attention(self.absorb(q), entries, entries[..., : self.read_width(q.shape[1])])
        return torch.einsum("bthc,hvc->bthv", o[..., : self.config.rank], self._maps()[1])

    def read_width(self, queries: int) -> int:
        """Channels of an entry that so many queries read as values, in the absorbed form."""
        return self.config.rank

    def is_absorbed(self, queries: int, keys: int, reach: int | None) -> bool:
        """Whether queries go to the latents, and not the latents to keys and values of every head."""
        expanded, absorbed = self.costs(queries, keys, reach)
        return absorbed < expanded and is_plain_linear(self.expand)

    def expanded(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[B, T, H, K + R]`` and values ``[B, T, H, V]``."""
        config = self.config
        latent, shared = entries.split([config.rank, config.shared], dim=-1)
        k, v = self.expand(latent.squeeze(2)).unflatten(-1, (config.heads, -1)).split([config.keys, config.values], -1)
        return torch.cat([k, shared.expand(-1, -1, config.heads, -1)], dim=-1), v

    def absorb(self, q: Tensor) -> Tensor:
        """Queries ``[B, T, H, C + R]`` in the space of the latents."""
        own, turned = q.split([self.config.keys, self.config.shared], dim=-1)
        return torch.cat([torch.einsum("bthk,hkc->bthc", own, self._maps()[0]), turned], dim=-1)

    def _maps(self) -> tuple[Tensor, ...]:
        """The maps of the latents to each head's keys ``[H, K, C]`` and values ``[H, V, C]``."""
        maps = self.expand.weight.unflatten(0, (self.config.heads, -1))
        return maps.split([self.config.keys, self.config.values], dim=1)

    def costs(self, queries: int, keys: int, reach: int | None = None) -> tuple[int, int]:
        """FLOPs per row of the two forms, but for what both share: ``expand`` once per query."""
        config = self.config
        pairs = partial(attention_flops, queries, keys, config.heads, window=reach)
        expand = 2 * config.rank * config.heads * (config.keys + config.values)
        expanded = pairs(key_width=config.keys + config.shared, value_width=config.values)
        absorbed = pairs(key_width=config.rank + config.shared, value_width=self.read_width(queries))
        return expanded + expand * (keys - queries), absorbed


class MLA(LatentMixer, CacheMixer):
    """``o_t = sum_j softmax_j((q_t . W_k c_j + p_t . r_j) / sqrt(K + R)) W_v c_j`` with one latent c_j for all heads.

    ``c = norm(W_c x)``; ``r = W_r x`` is one rotated key for all heads, p the rotated part of each head's query; W_k
    and W_v differ by head. The cache holds c and r: C + R numbers per token. Liu et al. 2024, "DeepSeek-V2", section
    2.1. Not grouped heads, which share whole keys and values. Halves of the shared channels turn (in DeepSeek's release
    neighbours: a fixed permutation of W_r and the queries); with ``position="none"`` they are there and do not turn, as
    in Kimi Linear. Projections have ``nn.Linear``'s initialisation, norms start at 1.

    It is computed in one of two forms with the same result, whichever takes fewer FLOPs. Expanded: the latents, those
    of the cache too, become keys and values of every head. Absorbed: the queries go through W_k into the space of the
    latents, which then are one head of keys and values, and what is read goes through W_v. The first saves
    ``2 C - K - V`` multiply-adds a pair of query and key and head, the second ``C (K + V)`` an earlier token: so
    sequences from their start are expanded (while C is above the mean of K and V), steps absorbed. Absorbing needs the
    matrices themselves: where ``expand`` is another module or has hooks (an adapter, a quantiser), all are expanded.
    """

    Config = MLAConfig

    @from_options
    def __init__(self, config: MLAConfig):
        super().__init__(config)
        self.cache_shape = (1, config.rank + config.shared, 0)

    def project(self, x: Tensor, conv: Tensor | None, place: Place) -> tuple[list[Tensor], Tensor | None]:
        """Queries ``[B, T, H, K + R]``, latents and shared keys ``[B, T, 1, C + R]``, and no values."""
        q, entries = self.latents(x, self.query(x), place.positions)
        return [q, entries, entries[..., :0]], None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *selection: Tensor, **where: Any) -> Tensor:
        return self.read_latents(q, k, partial(ops.attention, scale=self.config.scale, **where), None)

    def read_width(self, queries: int) -> int:
        """Of one query whole entries: fused kernels want keys and values of one width."""
        return self.config.rank + (self.config.shared if queries == 1 else 0)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return batch_size * min(self.costs(length, length))

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        maps = self.flops(1) - self.sequence_flops(1)
        return batch_size * (maps + min(self.costs(1, length + 1)))
