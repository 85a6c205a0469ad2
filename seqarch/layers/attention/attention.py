"""Softmax attention as a mixer: full, or over a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.attention.base import CachedAttention, Kept
from seqarch.layers.attention.options import CachedAttentionConfig
from seqarch.layers.mixer import Boundaries, Device
from seqarch.layers.modules.configured import from_options
from seqarch.ops.attention import flops as attention_flops


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(CachedAttentionConfig):
    """Options of :class:`Attention`.

    Attributes:
        window: tokens that each token sees, itself included; ``None`` for all before it.
        scale: multiplies the scores; by default ``K ** -0.5``. A constant by which a model multiplies its queries or
            keys (Falcon-H1's ``key_multiplier``) is a factor of it.
        logit_cap: bounds the scores softly, ``c tanh(score / c)``, as in Gemma 2; ``None`` leaves them.
        sinks: a learnt score of each head beside those of the tokens, to which no value belongs (GPT-OSS); 0 at first.
        give_kv: a name of one's own, by which later layers of the stack read this layer's keys and values.
        take_kv: such a name: the layer has no keys and values of its own, and no state, and reads those which the last
            earlier layer that gives this name has and holds (Sun et al. 2024, "You Only Cache Once"; Brandon et al.
            2024, "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention"). Their heads, norm, rotation
            and window are the giver's; with a window of its own, it reads the last of them.
    """

    size_options: ClassVar[dict[str, str]] = {"window": "window", **CachedAttentionConfig.size_options}

    kept_options: ClassVar[tuple[str, ...]] = (*CachedAttentionConfig.kept_options, "scale", "logit_cap", "sinks")

    window: int | None = None
    scale: float | None = None
    logit_cap: float | None = None
    sinks: bool = False
    give_kv: str | None = None
    take_kv: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.give_kv is not None and self.take_kv is not None:
            raise ValueError(f"give_kv ({self.give_kv!r}) and take_kv ({self.take_kv!r}): expected one of them")
        if self.take_kv is not None and self.conv_width:
            raise ValueError(
                f"take_kv={self.take_kv!r} has no state for a short convolution: conv_width is {self.conv_width},"
                " expected 0"
            )


class NoState(NamedTuple):
    """State of an attention that reads another layer's keys and values: nothing."""


class Attention(CachedAttention):
    """``o_t = sum_j softmax_j(q_t . k_j / sqrt(K)) v_j`` over the tokens up to t, or the last ``window`` of them.

    Vaswani et al. 2017, "Attention Is All You Need", section 3.2, with what its successors share: no biases, rotary
    positions (Su et al. 2021, "RoFormer"), and as options grouped heads (Ainslie et al. 2023, "GQA"), normalised
    queries and keys (Henry et al. 2020, with the RMS norm of Qwen3 or of OLMo 2), biases, a depthwise convolution
    after the projections (So et al. 2021, "Primer") and an output gate per channel or head (Qiu et al. 2025, "Gated
    Attention for Large Language Models"; Qwen3-Next), sinks (OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card").
    Projections have ``nn.Linear``'s initialisation, norms start at 1.
    """

    Config = AttentionConfig
    kept_parts = (*CachedAttention.kept_parts, "sinks")
    sinks: nn.Parameter | None

    @from_options
    def __init__(self, config: AttentionConfig):
        super().__init__(config)
        self.register_parameter("sinks", nn.Parameter(torch.zeros(config.heads)) if config.sinks else None)
        self.gives = () if config.give_kv is None else (_shared(config.give_kv),)
        self.takes = () if config.take_kv is None else (_shared(config.take_kv),)

    @property
    def projected(self) -> int:
        return 3 if self.config.take_kv is None else 1

    def exchange(
        self, x: Tensor, state: Any, cu_seqlens: Boundaries, taken: Mapping[str, Any]
    ) -> tuple[Tensor, Any, Mapping[str, Any]]:
        if not self.takes:
            y, state, kept = self.mix_and_keep(x, state, cu_seqlens)
            return y, state, dict.fromkeys(self.gives, kept)
        kept: Kept = taken[self.takes[0]]
        queries, _ = self.project(x, None, kept.place)
        return self.read(x, queries, kept), state, {}

    def check_giver(self, giver: Any) -> None:
        own, other = self.config, giver.config
        if not isinstance(giver, Attention):
            raise ValueError("that gives no keys and values")
        turned = ("rotary_base", "rotary_fraction", "rope_scaling") if own.position == "rotary" else ()
        for name in ("kv_heads", "head_width", "position", *turned):
            if (mine := getattr(own, name)) != (given := getattr(other, name)):
                raise ValueError(f"it has {name}={mine!r}, expected {given!r} as {own.take_kv!r} has")
        if other.window is not None and (own.window is None or own.window > other.window):
            raise ValueError(
                f"its window is {own.window}, expected at most the {other.window} tokens that {own.take_kv!r} holds"
            )

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> Any:
        return NoState() if self.takes else super().new_state(batch_size, max_length, device, dtype)

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        return 0 if self.takes else super().state_bytes(length, batch_size)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *selection: Tensor, **where: Any) -> Tensor:
        config = self.config
        options = {"window": config.window, "scale": config.scale, "logit_cap": config.logit_cap}
        return ops.attention(q, k, v, sinks=self.sinks, **options, **where)

    @property
    def cache_window(self) -> int | None:
        return None if self.config.window is None else self.config.window - 1

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        config = self.config
        return attention_flops(
            length, length, config.heads, config.head_width, config.head_width, True, config.window, batch_size
        )


def _shared(name: str) -> str:
    """What the keys and values of this name are handed on as."""
    return f"keys and values {name!r}"


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
