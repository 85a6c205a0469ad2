"""Forgetting attention (FoX): softmax attention whose scores fall by the forget gates between query and key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.attention.base import CachedAttention, Kept, Place
from seqarch.layers.attention.options import CachedAttentionConfig
from seqarch.layers.mixer import Boundaries, Device, first_tensor
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.kv_cache import KVCache, PackedKV
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import HeadNorm
from seqarch.layers.modules.token_shift import TokenShift
from seqarch.ops.attention import flops as attention_flops
from seqarch.ops.chunked.packing import over_sequences
from seqarch.ops.dispatch.checks import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class ForgettingAttentionConfig(CachedAttentionConfig):
    """Options of :class:`ForgettingAttention`.

    The paper's Pro block is ``qk_norm``, ``output_gate``, ``output_norm`` and ``kv_shift``, all true.

    Attributes:
        position: ``"none"``, as in the paper, whose gates say what is near; or ``"rotary"``.
        window: tokens that each token sees, itself included; ``None`` for all before it.
        output_norm: an RMS norm with weights over what each head reads, before the output gate.
        kv_shift: keys and values are mixtures of a token's own and those of the token before, by a share of each head
            of keys, and of values, that depends on the token.
        forget_bias: the bias of the forget gates' logits at first.
    """

    size_options: ClassVar[dict[str, str]] = {"window": "window", **CachedAttentionConfig.size_options}

    slow_gates: ClassVar[dict[str, float]] = {"forget_bias": 6.0}

    may_be_zero: ClassVar[tuple[str, ...]] = (*CachedAttentionConfig.may_be_zero, "forget_bias")

    position: str = "none"
    window: int | None = None
    output_norm: bool = False
    kv_shift: bool = False
    forget_bias: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.kv_shift and self.conv_width:
            raise ValueError(f"kv_shift=True mixes tokens as a short convolution does: conv_width is {self.conv_width},"
                             " expected 0")  # fmt: skip


class ForgettingState(NamedTuple):
    """State of :class:`ForgettingAttention`.

    Attributes:
        conv: the short convolution's last inputs, or with ``kv_shift`` the last keys and values before it; or ``None``.
        cache: keys and values.
        forgotten: of each held key, as its keys ``[B, capacity, H, 1]``, the sums of log forget gates up to its token,
            float32 or wider; its values have no width.
    """

    conv: Tensor | None
    cache: KVCache | PackedKV
    forgotten: KVCache | PackedKV


class ForgettingAttention(CachedAttention):
    """``o_t = sum_j softmax_j(q_t . k_j / sqrt(K) + sum_{j < l <= t} log f_l) v_j``, ``f_l = sigmoid(W_f x_l + b_f)``.

    A forget gate per query head and token; where all are 1 this is attention without positions. Lin et al. 2025,
    "Forgetting Transformer: Softmax Attention with a Forget Gate", eq. 3-6 and, for the Pro block, section 3.3. Not
    gated linear attention, which forgets by the same gates but has a state of fixed size and no softmax; not ALiBi,
    whose slopes do not depend on the tokens. The sums up to each token are cached, and scores get differences of them:
    with gates near 1 they hold for any length, while sums of thousands, in float32, leave the weights three digits.
    ``W_f`` and the projections have ``nn.Linear``'s initialisation, ``b_f`` is 0 at first.
    """

    Config = ForgettingAttentionConfig
    State = ForgettingState
    unquantized = ("forget",)

    @from_options
    def __init__(self, config: ForgettingAttentionConfig):
        super().__init__(config)
        self.forget = Linear(config.d_model, config.heads)
        nn.init.constant_(self.forget.bias, config.forget_bias)
        self.read_norm = HeadNorm(config.head_width, config.norm_eps) if config.output_norm else nn.Identity()
        if config.kv_shift:
            self.shift = TokenShift(2 * config.kv_heads * config.head_width)
            self.shares = Linear(config.d_model, 2 * config.kv_heads, bias=False)

    def project_heads(
        self, x: Tensor, conv: Tensor | None, cu_seqlens: Boundaries
    ) -> tuple[list[Tensor], Tensor | None]:
        if not self.config.kv_shift:
            return super().project_heads(x, conv, cu_seqlens)
        (q, *own), _ = self.qkv_proj(x)
        # keys and values side by side, [B, T, 2 G, K]
        now = torch.cat(own, dim=2)
        before, conv = self.shift(now.flatten(2), conv, cu_seqlens)
        mixed = torch.lerp(now, before.view_as(now), self.shares(x).sigmoid().unsqueeze(-1))
        return [q, *mixed.chunk(2, dim=2)], conv

    def select(self, q: Tensor, k: Tensor, place: Place, *entries: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        return (), entries

    def add_to_scores(self, x: Tensor, kept: Kept, *entries: Any) -> tuple[Kept, tuple[Any, ...]]:
        kept, forgotten = add_gates(self, F.logsigmoid(self.forget(x).to(self._sum_dtype)), kept, entries[0])
        return kept, (forgotten,)

    def output(self, x: Tensor, o: Tensor) -> Tensor:
        return super().output(x, self.read_norm(o))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *selection: Tensor, **where: Any) -> Tensor:
        return ops.attention(q, k, v, window=self.config.window, **where)

    @property
    def cache_window(self) -> int | None:
        return None if self.config.window is None else self.config.window - 1

    @property
    def _sum_dtype(self) -> torch.dtype:
        """That of sums of log gates: float64 in a float64 module, else float32."""
        return accumulation_dtype(first_tensor(self))

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> ForgettingState:
        conv, cache = super().new_state(batch_size, max_length, device, dtype)
        shape = (*cache.keys.shape[:2], self.config.heads, 1)
        sums = torch.zeros(shape, device=cache.keys.device, dtype=self._sum_dtype)
        return ForgettingState(conv, cache, KVCache(sums, sums[..., :0], 0))

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        held = length if self.cache_window is None else min(length, self.cache_window)
        sums = batch_size * held * self.config.heads * self._sum_dtype.itemsize
        return super().state_bytes(length, batch_size) + sums

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        heads, width = self.config.heads, self.config.head_width
        return attention_flops(length, length, heads, width, width, True, self.config.window, batch_size)


def add_gates(mixer: CachedAttention, log_f: Tensor, kept: Kept, forgotten: Any) -> tuple[Kept, Any]:
    """What is read, with minus the sums of log forget gates up to each key added to its scores, relative to the last
    token's where rows end together; and the cache of these sums, ``[B, capacity, H, 1]``."""
    before = forgotten.as_rows()
    sums, _ = over_sequences(_add_up, kept.place.cu_seqlens, _last(before, mixer.cache_window), log_f)
    sums = sums.unsqueeze(-1)
    found, after = mixer.keep(before, sums, sums[..., :0], kept.place)
    if not isinstance(found.keys, Tensor):
        return kept._replace(bias=[-row.squeeze(-1) for row in found.keys]), after
    c = found.keys.squeeze(-1)
    # what all keys share changes no weight: near the last token, differences are small numbers
    c = c if kept.place.cu_seqlens is not None else c - c[:, -1:].detach()
    return kept._replace(bias=-c), after


def _last(sums: KVCache, cache_window: int | None) -> Tensor:
    """The sums up to each row's last token, ``[B, H]``: zeros before the first."""
    held = sums.held(cache_window)
    if not held:
        return sums.keys.new_zeros(sums.rows, sums.keys.shape[2])
    return sums.keys.narrow(1, held - 1, 1)[:, 0, :, 0]  # an index would make a captured token one of this length alone


def _add_up(before: Tensor, log_f: Tensor) -> tuple[Tensor, Tensor]:
    """The sums ``[B, T, H]`` of log gates up to each token, from those before ``[B, H]``, and the last of them."""
    sums = torch.cat([before.unsqueeze(1), log_f], dim=1).double().cumsum(1).to(log_f.dtype)
    return sums[:, 1:], sums[:, -1]
