"""Comba: a gated delta rule whose correction reads the state before it decays, and whose output is corrected too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.delta_rule.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.norms import GatedRMSNorm

LEAST_LOG_DECAY = -60.0
"""What decays further, to less than ``1e-26``, is not told apart: reads are divided by decays, in float32."""


@dataclass(frozen=True, kw_only=True)
class CombaConfig(GatedDeltaNetConfig):
    """Options of :class:`Comba`.

    Attributes:
        output_correction: D of every head at first; the release says that .02 was better in small models than its 1.
    """

    output_correction: float = 1.0


class Comba(GatedDeltaNet):
    """``S_t = a_t S_{t-1} + beta_t k_t^T (v_t - p_t S_{t-1})``, ``o_t = (q_t - D p_t) S_t / sqrt(K)``, ``p_t = b k_t``.

    ``b = sigmoid(d)`` and D are learnt, one of each head; decay, beta, short convolutions and widths are those of Gated
    DeltaNet. Hu et al. 2025, "Comba: Improving Bilinear RNNs with Closed-loop Control", section 3. Not Gated DeltaNet,
    whose correction reads the state after its decay, at the full strength of beta, and whose queries are read as they
    are. The output is ``norm(o) sigmoid(W_g x)``. d is 1 at first, D as ``output_correction`` says.

    Queries and keys have unit norm before p is made of them, as in the paper's equations. The release makes p and the
    corrected query first and normalises all three after, so that there b cancels, whatever d is, and the corrected
    query has unit norm.
    """

    Config = CombaConfig

    @from_options
    def __init__(self, config: CombaConfig):
        super().__init__(config)
        groups, _ = config.key_shape
        self.norm = GatedRMSNorm(config.values, gate="after", eps=config.norm_eps, activation="sigmoid")
        self.feedback = nn.Parameter(torch.ones(groups))
        self.D = nn.Parameter(torch.full((groups,), config.output_correction))

    def recurrence(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, recurrent: Tensor, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Tensor]:
        a, b = self.ab_proj(x).chunk(2, dim=-1)
        log_decay = self.log_decay(a).clamp(min=LEAST_LOG_DECAY)
        p = k * self.feedback.sigmoid().to(k.dtype).unsqueeze(-1)
        q = q - self.D.to(q.dtype).unsqueeze(-1) * p
        # the operation reads the state after its decay, and each head of values has a decay of its own
        if (shared := v.shape[2] // k.shape[2]) > 1:
            q, k, p = (each.repeat_interleave(shared, dim=2) for each in (q, k, p))
        read = (p.to(log_decay.dtype) * (-log_decay).exp().unsqueeze(-1)).to(k.dtype)
        return ops.delta_rule(q, k, v, self.beta(b), log_decay, read=read, state=recurrent, cu_seqlens=cu_seqlens)
