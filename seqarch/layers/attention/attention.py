"""Softmax attention as a mixer: full, or over a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.attention.base import CachedAttention, CachedAttentionConfig
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
    """

    size_options: ClassVar[dict[str, str]] = {"window": "window", **CachedAttentionConfig.size_options}

    window: int | None = None
    scale: float | None = None
    logit_cap: float | None = None
    sinks: bool = False


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
    sinks: nn.Parameter | None

    @from_options
    def __init__(self, config: AttentionConfig):
        super().__init__(config)
        self.register_parameter("sinks", nn.Parameter(torch.zeros(config.heads)) if config.sinks else None)

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
