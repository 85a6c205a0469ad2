"""Gated DeltaNet-2: Kimi delta attention that erases and writes by gates of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from seqarch import ops
from seqarch.layers.delta_rule.kda import KDA, KDAConfig
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet2Config(KDAConfig):
    """Options of :class:`GatedDeltaNet2`: those of kda; negative eigenvalues double the erase gate."""


class GatedDeltaNet2(KDA):
    """Erases and writes by gates apart, channel by channel: ``S_t = P + k_t^T (w_t * v_t) - k_t^T ((b_t * k_t) P)``.

    ``P = diag(a_t) S_{t-1}``; ``b = sigmoid(W_b x)`` has one entry per key dimension, ``w = sigmoid(W_w x)`` one per
    value dimension. All else is kda's, which it becomes where both gates are one scalar. Hatamizadeh et al. 2026,
    "Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention", abstract. Not gated_delta_net with two steps a
    token: that is gated_delta_product. The output gate has no bias (that of flash-linear-attention's layer has one).
    """

    Config = GatedDeltaNet2Config

    @from_options
    def __init__(self, config: GatedDeltaNet2Config):
        super().__init__(config, betas=math.prod(config.key_shape) + math.prod(config.value_shape))

    def recurrence(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, recurrent: Tensor, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Tensor]:
        b, w = self.beta_proj(x).split([math.prod(k.shape[2:]), math.prod(v.shape[2:])], dim=-1)
        # b scales what is read and so erased, w what is written
        read, v = self.beta(b).view_as(k) * k, w.sigmoid().view_as(v) * v
        return ops.delta_rule(q, k, v, log_decay=self.decays(x), read=read, state=recurrent, cu_seqlens=cu_seqlens)
