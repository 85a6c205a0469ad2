"""PaTH attention: positions are products of Householder-like matrices that the tokens between make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.attention.base import CachedAttention, Place
from seqarch.layers.attention.forgetting_attention import add_gates
from seqarch.layers.attention.options import CachedAttentionConfig
from seqarch.layers.mixer import Boundaries, Device, first_tensor
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.heads import HeadProjection
from seqarch.layers.modules.kv_cache import KVCache, PackedKV, replace_keys
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import l2_normalise
from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.path_attention import flops as path_attention_flops


@dataclass(frozen=True, kw_only=True)
class PathAttentionConfig(CachedAttentionConfig):
    """Options of :class:`PathAttention`.

    Attributes:
        position: ``"none"``, as in the paper, whose matrices say where keys are; or ``"rotary"``.
        conv_width: width of the short convolution with SiLU that makes w, and w alone; 0 for none.
        w_rank: rank of the map from the input to w, before that convolution; 0 for a matrix of full rank, as the
            release has it where query heads share keys.
        forget_gate: a forget gate of each query head, as in forgetting attention (PaTH-FoX).
        forget_bias: the bias of its logits at first.
    """

    kept_options: ClassVar[tuple[str, ...]] = tuple(
        option for option in CachedAttentionConfig.kept_options if option != "conv_width"
    )

    may_be_zero: ClassVar[tuple[str, ...]] = (*CachedAttentionConfig.may_be_zero, "w_rank", "forget_bias")

    position: str = "none"
    conv_width: int = 3
    w_rank: int = 32
    forget_gate: bool = False
    forget_bias: float = 0.0


class PathState(NamedTuple):
    """State of :class:`PathAttention`.

    Attributes:
        conv: the last inputs of w's short convolution, or ``None`` without one.
        turned: keys, multiplied by the matrices of all tokens after them, and values. The keys are float32 or wider, as
            they are computed anew with every token.
        forgotten: as in forgetting attention, or ``None`` without gates.
    """

    conv: Tensor | None
    turned: KVCache | PackedKV
    forgotten: KVCache | PackedKV | None


class PathAttention(CachedAttention):
    """``o_t = sum_j softmax_j(q_t H_t ... H_{j+1} k_j^T / sqrt(K)) v_j``, ``H_l = I - b_l w_l^T w_l``.

    ``w = normalise(silu(conv(W_2 W_1 x)))`` and ``b = 2 sigmoid(W_b x + c)``, one of each head of keys. Yang et al.
    2025, "PaTH Attention: Position Encoding via Accumulating Householder Transformations", section 2, and with
    ``forget_gate`` PaTH-FoX, section 3.3. Not rotary positions, whose rotations depend on the distance alone; not the
    delta rule, whose matrices are the same but act on a state of fixed size. The cache holds keys as they stand after
    the last token, so that a token multiplies all of them by its matrix and then reads them. Projections have
    ``nn.Linear``'s initialisation.
    """

    Config = PathAttentionConfig
    State = PathState
    kept_parts = ("query_norm", "key_norm", "gate")
    unquantized = ("rate", "forget")

    @from_options
    def __init__(self, config: PathAttentionConfig):
        super().__init__(config)
        size, rank = config.d_model, config.w_rank
        self.w_low = Linear(size, rank, bias=False) if rank else torch.nn.Identity()
        parts = [(config.kv_heads, config.head_width)]
        self.w_proj = HeadProjection(rank or size, parts, config.conv_width, "silu" if config.conv_width else None)
        self.rate = Linear(size, config.kv_heads)
        self.forget = Linear(size, config.heads) if config.forget_gate else None
        if self.forget is not None:
            torch.nn.init.constant_(self.forget.bias, config.forget_bias)

    def projection(self, parts: list[tuple[int, int]]) -> HeadProjection:
        return HeadProjection(self.config.d_model, parts, bias=self.config.qkv_bias)

    def project(self, x: Tensor, conv: Tensor | None, place: Place) -> tuple[list[Tensor], Tensor | None]:
        """Queries, keys and values, and the factors w and b of this call's tokens."""
        (q, k, v), _ = super().project(x, None, place)
        (w,), conv = self.w_proj(self.w_low(x), conv, place.cu_seqlens)
        wide = self._key_dtype
        return [q, k.to(wide), v, l2_normalise(w.to(wide)), 2 * self.rate(x).to(wide).sigmoid()], conv

    def mix(self, x: Tensor, state: PathState, cu_seqlens: Boundaries) -> tuple[Tensor, PathState]:
        conv, cache, forgotten = state
        cache, place = self.place(cache, x, cu_seqlens)
        (q, k, v, w, beta), conv = self.project(x, conv, place)
        kept, cache = self.keep(cache, k, v, place)
        if self.forget is not None:
            kept, forgotten = add_gates(self, F.logsigmoid(self.forget(x).to(self._key_dtype)), kept, forgotten)
        read = self.attend_to(kept, (q, w, beta))
        if isinstance(read, list):
            outputs, rows = zip(*read, strict=True)
            o, keys = torch.cat(outputs, dim=1), [row[0] for row in rows]
        else:
            o, keys = read
        return self.output(x, o), PathState(conv, replace_keys(cache, keys, cu_seqlens), forgotten)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *selection: Tensor, **where: Any) -> Any:
        """The outputs, and the keys after the last token."""
        return ops.path_attention(q, k, v, *selection, **where)

    @property
    def _key_dtype(self) -> torch.dtype:
        """That of keys, their factors and sums of log gates: float64 in a float64 module, else float32."""
        return accumulation_dtype(first_tensor(self))

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> PathState:
        conv, cache = super().new_state(batch_size, max_length, device, dtype)
        cache = cache._replace(keys=cache.keys.to(self._key_dtype))
        if self.forget is None:
            return PathState(conv, cache, None)
        sums = cache.keys.new_zeros(*cache.keys.shape[:2], self.config.heads, 1)
        return PathState(conv, cache, KVCache(sums, sums[..., :0], 0))

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        heads, keys, _ = self.cache_shape
        wider = self._key_dtype.itemsize - first_tensor(self).element_size()
        sums = 0 if self.forget is None else self.config.heads * self._key_dtype.itemsize
        return super().state_bytes(length, batch_size) + batch_size * length * (heads * keys * wider + sums)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        heads, groups, width = self.config.heads, self.config.kv_heads, self.config.head_width
        return path_attention_flops(length, length, heads, groups, width, width, batch_size)
