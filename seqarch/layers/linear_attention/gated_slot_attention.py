"""Gated slot attention (GSA): softmax attention to a fixed number of slots that forget as they are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.heads import HeadProjection, HeadWidthConfig
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import HeadNorm
from seqarch.layers.recurrent_mixer import RecurrentMixer, RecurrentState
from seqarch.ops.linear_attention import flops as linear_attention_flops


@dataclass(frozen=True, kw_only=True)
class GatedSlotAttentionConfig(HeadWidthConfig):
    """Options of :class:`GatedSlotAttention`.

    Attributes:
        num_slots: M, slots of each head.
        temperature: the gates' root; larger forgets, and writes, more slowly.
        conv_width: width of a short convolution over queries, keys and values; 0, as in the paper, for none.
        norm_eps: added to the mean square in the norm of the output.
    """

    size_options: ClassVar[dict[str, str]] = {**HeadWidthConfig.size_options, "num_slots": "num_slots"}

    slow_gates: ClassVar[dict[str, float]] = {"temperature": 512.0}

    num_slots: int = 64
    temperature: float = 8.0
    conv_width: int = 0
    norm_eps: float = 1e-5


class GatedSlotAttention(RecurrentMixer):
    """``K_t = a_t K_{t-1} + (1 - a_t) k_t``, ``V_t`` alike of ``v_t``, ``o_t = softmax(q_t K_t^T) V_t``, slot by slot.

    Each of M slots holds a key and a value, running means of those of the tokens, by a gate of its own
    ``a_t = sigmoid(W_a x_t)^(1 / 8)``; q, k and v go through SiLU and there is no scale. The output is
    ``norm(silu(o))``, one RMS norm over all heads. Zhang et al. 2024, "Gated Slot Attention for Efficient Linear-Time
    Sequence Modeling", section 3. Not attention to the last M tokens: a token goes into all slots. Not gla, whose two
    products have no softmax between them. It runs as two linear attentions, of which the first reads the slots' keys,
    as M heads of width 1 that share their queries and keys, each with a decay of its own. Projections have
    ``nn.Linear``'s initialisation.
    """

    Config = GatedSlotAttentionConfig
    unquantized = ("forget",)

    @from_options
    def __init__(self, config: GatedSlotAttentionConfig):
        super().__init__(config)
        heads, width = config.heads, config.head_width
        self.qkv_proj = HeadProjection(config.d_model, [(heads, width)] * 3, config.conv_width, "silu")
        self.forget = Linear(config.d_model, heads * config.num_slots, bias=False)
        self.norm = HeadNorm(config.inner, config.norm_eps)  # of all heads as one
        self.out_proj = Linear(config.inner, config.d_model, bias=False)
        self.state_shape = (heads, config.num_slots, 2 * width)  # slots' keys, then their values

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        (q, k, v), conv = self.qkv_proj(x, state.conv, cu_seqlens)
        keys, values = state.recurrent.chunk(2, dim=-1)
        heads, slots, width = keys.shape[1:]
        # [B, T, H, M]; 1 - a without the cancellation of computing a
        log_decay = F.logsigmoid(self.forget(x).to(self.state_dtype)) / self.config.temperature
        log_decay = log_decay.unflatten(-1, (heads, slots))
        written = -torch.expm1(log_decay).to(q.dtype)
        given = {"scale": 1.0, "cu_seqlens": cu_seqlens}
        # a slot is a head of values one wide, whose state is the slot's key
        slot_keys = {"state": keys.reshape(-1, heads * slots, width, 1), **given}
        scores, keys = ops.linear_attention(q, k, written.flatten(2).unsqueeze(-1), log_decay.flatten(2), **slot_keys)
        weights = scores.view(written.shape).to(self.state_dtype).softmax(-1).to(q.dtype)
        o, values = ops.linear_attention(weights, written, v, log_decay, state=values, **given)
        recurrent = torch.cat([keys.view(-1, heads, slots, width), values], dim=-1)
        y = self.norm(rearrange(F.silu(o), "b t h v -> b t (h v)"))
        return self.out_proj(y), RecurrentState(conv, recurrent)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        heads, slots, width = self.config.heads, self.config.num_slots, self.config.head_width
        keys = linear_attention_flops(length, heads * slots, width, 1, batch_size)
        return keys + linear_attention_flops(length, heads, slots, width, batch_size)
