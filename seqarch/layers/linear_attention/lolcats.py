"""LoLCATs' mixer: softmax attention over a window and linear attention of what is before it, divided by one sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.attention.base import CachedAttention, Kept
from seqarch.layers.attention.options import CachedAttentionConfig
from seqarch.layers.linear_attention.largest_scores import flops as largest_flops
from seqarch.layers.linear_attention.largest_scores import largest_scores
from seqarch.layers.mixer import Boundaries, Device, first_tensor
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.kv_cache import KVCache, PackedKV
from seqarch.ops.attention import flops as attention_flops
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.linear_attention import flops as linear_attention_flops


@dataclass(frozen=True, kw_only=True)
class LoLCATsConfig(CachedAttentionConfig):
    """Options of :class:`LoLCATs`; the defaults are those of the released configurations.

    Attributes:
        window: w, tokens that each token sees by softmax attention, itself included.
        feature_width: F, columns of the matrix of each head's feature map, which has twice as many features.
        first_window_factor: the share ``sigmoid(g)`` by which weights of the window are multiplied, at first.
        scale: multiplies the scores of the window; by default ``K ** -0.5``.
    """

    size_options: ClassVar[dict[str, str]] = {"window": "window", "feature_width": "feature_width"}

    kept_options: ClassVar[tuple[str, ...]] = (*CachedAttentionConfig.kept_options, "scale")

    window: int = 64
    feature_width: int = 64
    first_window_factor: float = 0.1
    scale: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.first_window_factor < 1:
            raise ValueError(f"first_window_factor is {self.first_window_factor!r}, expected a number between 0 and 1")


class LoLCATsState(NamedTuple):
    """State of :class:`LoLCATs`.

    Attributes:
        conv: the short convolution's last inputs, or ``None`` without one.
        cache: keys (rotated) and values of the last w tokens.
        recurrent: of the tokens before these, the sums of ``phi(k)^T [v, 1]``, ``[B, H, 2 F, V + 1]``.
    """

    conv: Tensor | None
    cache: KVCache | PackedKV
    recurrent: Tensor


class LoLCATs(CachedAttention):
    """``y_t = (sum_near a_tj v_j + sum_far b_tj v_j) / (sum_near a_tj + sum_far b_tj)``, near the last w tokens.

    ``a_tj = sigmoid(g) exp(s_tj - m_t)`` with ``s_tj = q_t . k_j / sqrt(K)`` and ``m_t = max_near s_tj``, g a learned
    number of each head; ``b_tj = phi_q(q_t) . phi_k(k_j)`` with Hedgehog's features, a map of each head for queries and
    one for keys. Zhang et al. 2024, "LoLCATs: On Low-Rank Linearizing of Large Language Models", section 3 (its hybrid
    of linear and sliding window attention), which a transformer's attention is converted to: up to w tokens it is that
    attention exactly. Not Hedgehog (Zhang et al. 2024) alone, which is linear attention of all tokens; not Based, whose
    window and linear part have projections of their own and are added; not gated slot attention, whose state is read by
    a softmax; nor Infini-attention, which adds its two parts by a gate, each divided by its own sum.

    As in the authors' release (HazyResearch/lolcats): keys are in the window or in the sums, never in both; features
    are of rotated queries and keys; keys have a map of each query head, also where heads share them; the largest score
    is part of the function, with a gradient, as ``b_tj`` is not divided by ``exp(m_t)``; maps start from
    ``U(-sqrt(6 / (K F)), sqrt(6 / (K F)))`` (Hedgehog's own start is the identity), g where its sigmoid is 0.1. What
    differs: features are not held above 1e-12, as the window's weights, of which one is ``sigmoid(g)``, keep the sum
    from 0; and of scores that tie for the largest one the first has the gradient, where theirs share it. Projections
    have ``nn.Linear``'s initialisation.
    """

    Config = LoLCATsConfig
    kept_parts = (*CachedAttention.kept_parts, "query_map", "key_map", "window_factor")
    State = LoLCATsState

    @from_options
    def __init__(self, config: LoLCATsConfig):
        super().__init__(config)
        heads, width = config.heads, config.head_width
        self.query_map, self.key_map = (HedgehogMap(heads, width, config.feature_width) for _ in range(2))
        share = config.first_window_factor
        self.window_factor = nn.Parameter(torch.full((heads,), math.log(share / (1 - share))))
        self.state_shape = (heads, 2 * config.feature_width, width + 1)

    def mix(self, x: Tensor, state: LoLCATsState, cu_seqlens: Boundaries) -> tuple[Tensor, LoLCATsState]:
        conv, cache, recurrent = state
        cache, place = self.place(cache, x, cu_seqlens)
        (q, k, v), conv = self.project(x, conv, place)
        kept, cache = self.keep(cache, k, v, place)
        # near: the window's mean of values, and the sum of its weights as the largest one is 1
        near = self.attend_to(kept, (q, place.positions))
        if isinstance(near, list):
            near = (torch.cat(parts, dim=1) for parts in zip(*near, strict=True))
        o, log_sum = near
        near_sum = (log_sum.exp() * self.window_factor.to(log_sum.dtype).sigmoid()).unsqueeze(-1)
        # far: with each token, the one that leaves its window is written; the last channel is the sum of weights
        features, values = self._leaving(kept, x.shape[1])
        given = {"scale": 1.0, "state": recurrent, "cu_seqlens": cu_seqlens}
        far, recurrent = ops.linear_attention(self.query_map(q), features, values, **given)
        total, far_sum = far.to(near_sum.dtype).split([far.shape[-1] - 1, 1], dim=-1)
        y = (near_sum * o + total) / (near_sum + far_sum)
        return self.output(x, y.to(o.dtype)), LoLCATsState(conv, cache, recurrent)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *selection: Tensor, **where: Any) -> Any:
        """Over the window: the outputs, and the logarithms of the sums of weights, relative to the largest one."""
        (positions,), window, scale = selection, self.config.window, self.config.scale
        o, lse = ops.attention(q, k, v, window=window, scale=scale, return_lse=True, **where)
        return o, lse - largest_scores(q, k, positions, window, scale)

    def _leaving(self, kept: Kept, length: int) -> tuple[Tensor, Tensor]:
        """The features ``[B, T, H, 2 F]`` and values ``[B, T, H, V + 1]`` of the tokens w before those of this call:
        features of 0 where there is none."""
        window, cu_seqlens = self.config.window, kept.place.cu_seqlens
        k, v = (_delayed(rows, window, length, cu_seqlens) for rows in (kept.keys, kept.values))
        exists = (kept.place.positions >= window)[..., None, None]
        features = self.key_map(k)
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        return features * exists, v.repeat_interleave(features.shape[2] // v.shape[2], dim=2)

    @property
    def cache_window(self) -> int:
        """All of the window, so that with each token one is written to the sums."""
        return self.config.window

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> LoLCATsState:
        conv, cache = super().new_state(batch_size, max_length, device, dtype)
        wide = accumulation_dtype(first_tensor(self))
        sums = torch.zeros(batch_size, *self.state_shape, dtype=wide, device=cache.keys.device)
        return LoLCATsState(conv, cache, sums)

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        sums = math.prod(self.state_shape) * accumulation_dtype(first_tensor(self)).itemsize
        return super().state_bytes(length, batch_size) + batch_size * sums

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return self._flops(length, 0, batch_size)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        once = self.flops(1, batch_size) - self.sequence_flops(1, batch_size)
        return once + self._flops(1, length, batch_size)

    def _flops(self, queries: int, before: int, batch_size: int) -> int:
        config, keys = self.config, min(before, self.config.window) + queries
        heads, width = config.heads, config.head_width
        near = attention_flops(queries, keys, heads, width, width, True, config.window, batch_size)
        largest = largest_flops(queries, keys, heads, width, config.window, batch_size)
        maps = sum(each.flops(queries, batch_size) for each in self.modules() if isinstance(each, HedgehogMap))
        return near + largest + maps + linear_attention_flops(queries, *self.state_shape, batch_size=batch_size)


class HedgehogMap(nn.Module):
    """``[softmax(x_h W_h), softmax(-x_h W_h)]`` of each head h; weight ``[H, K, F]`` (from, to).

    Zhang et al. 2024, "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry", section 4,
    without biases, as in LoLCATs' release.
    """

    projections = ("weight",)
    fan_in_dims: ClassVar[dict[str, int]] = {"weight": 1}

    def __init__(self, heads: int, width: int, features: int):
        super().__init__()
        bound = math.sqrt(6 / (width * features))
        self.weight = nn.Parameter(torch.empty(heads, width, features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, G, K]`` to ``[B, T, H, 2 F]``: H / G heads have a map each of what they share."""
        weight = self.weight.unflatten(0, (x.shape[2], -1))
        logits = torch.einsum("btgk,grkf->btgrf", x, weight).flatten(2, 3)
        return torch.cat([logits.softmax(dim=-1), (-logits).softmax(dim=-1)], dim=-1)

    def flops(self, length: int, batch_size: int = 1) -> int:
        return 2 * batch_size * length * self.weight.numel()


def _delayed(rows: Tensor | list[Tensor], by: int, length: int, cu_seqlens: Boundaries) -> Tensor:
    """The T so many before the last, of ``[B, held + T, ...]`` or of a list of packed sequences' ``[held + new, ...]``.

    Where there are none, what is in their place has no meaning: the first ones are zeros.
    """
    if isinstance(rows, Tensor):
        missing = by - (rows.shape[1] - length)
        if missing >= length:
            return rows.new_zeros(rows.shape[0], length, *rows.shape[2:])
        return F.pad(rows[:, : length - missing], (0, 0, 0, 0, missing, 0))
    assert cu_seqlens is not None
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    return torch.cat([_delayed(row[None], by, new, None) for row, new in zip(rows, lengths, strict=True)], dim=1)
