"""Learnt retention: linear attention with one decay per head that is learnt and does not depend on the input."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.heads import HeadProjection, HeadsConfig
from seqarch.layers.recurrent_mixer import LinearMixer, RecurrentState


@dataclass(frozen=True, kw_only=True)
class LearntRetentionConfig(HeadsConfig):
    """Options of :class:`LearntRetention`.

    Attributes:
        forget: the share that each head forgets per token at first.
    """

    forget: float = 0.1


class LearntRetention(LinearMixer):
    """``S_t = a S_{t-1} + k_t^T v_t``, ``o_t = q_t S_t / sqrt(K)``, with one learnt ``a`` in (0, 1) per head."""

    Config = LearntRetentionConfig

    def __init__(self, config: LearntRetentionConfig):
        super().__init__(config)
        heads, width = config.heads, config.head_width
        self.qkv_proj = HeadProjection(config.d_model, [(heads, width)] * 3)
        self.decay = nn.Parameter(torch.full((heads,), 1 - config.forget).logit())
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.state_shape = (heads, width, width)

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        (q, k, v), _ = self.qkv_proj(x)
        log_decay = F.logsigmoid(self.decay.to(self.state_dtype))
        o, recurrent = ops.linear_attention(q, k, v, log_decay, state=state.recurrent, cu_seqlens=cu_seqlens)
        return self.out_proj(rearrange(o, "b t h v -> b t (h v)")), RecurrentState(None, recurrent)
