"""Lightning attention (MiniMax-01): linear attention with a fixed decay per head, which a factor weakens by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from seqarch import ops
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadProjection, HeadWidthConfig
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import HeadNorm
from seqarch.layers.recurrent_mixer import LinearMixer, RecurrentState
from seqarch.ops.dispatch.checks import unknown_name
from seqarch.ops.experts.activations import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class LightningAttentionConfig(HeadWidthConfig):
    """Options of :class:`LightningAttention`.

    Attributes:
        decay_factor: f, a constant of the layer: small in late layers of MiniMax-01, which so forget least.
        activation: of queries, keys and values, as :class:`seqarch.layers.Mlp` has it.
        norm_eps: added to the mean square in the norm of the output.
    """

    decay_factor: float = 1.0
    activation: str = "silu"
    norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)


class LightningAttention(LinearMixer):
    """``S_t = g_h S_{t-1} + k_t^T v_t``, ``o_t = q_t S_t`` with ``g_h = exp(-f 2^(-8 h / H))``, heads h from 1 to H.

    Queries, keys and values go through an activation; there are no rotations and no scale. The output is ``norm(o)
    sigmoid(W_g x)``, one RMS norm over all heads. MiniMax 2025, "MiniMax-01: Scaling Foundation Models with Lightning
    Attention", section 2.2, after Qin et al. 2023, "TransNormerLLM", eq. 3-6, as released; the slopes are ALiBi's.
    Not retention, which rotates queries and keys and has a norm per head. Projections have ``nn.Linear``'s
    initialisation.
    """

    takes_any_state = True

    Config = LightningAttentionConfig

    @from_options
    def __init__(self, config: LightningAttentionConfig):
        super().__init__(config)
        heads, width = config.heads, config.head_width
        self.qkv_proj = HeadProjection(config.d_model, [(heads, width)] * 3)
        self.gate = Linear(config.d_model, config.inner, bias=False)
        self.norm = HeadNorm(config.inner, config.norm_eps)  # of all heads as one
        self.out_proj = Linear(config.inner, config.d_model, bias=False)
        self.state_shape = (heads, width, width)

    def head_maps(self) -> list[HeadMap]:
        out = HeadMap("o", "out_proj", self.config.heads, self.config.head_width)
        return [*self.qkv_proj.head_maps("qkv_proj"), out]

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        parts, _ = self.qkv_proj(x)
        q, k, v = (ACTIVATIONS[self.config.activation](each) for each in parts)
        # one fixed decay per head, the first ones forget fastest
        heads = torch.arange(1, self.config.heads + 1, dtype=self.state_dtype, device=x.device)
        log_decay = -self.config.decay_factor * torch.exp2(-8 / self.config.heads * heads)
        o, recurrent = ops.linear_attention(q, k, v, log_decay, scale=1.0, state=state.recurrent, cu_seqlens=cu_seqlens)
        o = self.norm(rearrange(o, "b t h v -> b t (h v)"))
        return self.out_proj(o * self.gate(x).sigmoid()), RecurrentState(None, recurrent)
