"""Gated DeltaNet: the delta rule with a learnt decay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.delta_rule.base import DeltaRuleMixer, GatedDeltaRuleConfig
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.initialisation import step_size_bias
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import GatedRMSNorm


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(GatedDeltaRuleConfig):
    """Options of :class:`GatedDeltaNet`.

    Attributes:
        key_width: K; by default ``3 D / (4 H)``, so that the mixer has about ``6 D^2`` parameters as in the release.
    """

    expand_v: float = 2.0

    @property
    def head_width(self) -> int:
        return max(1, 3 * self.d_model // (4 * self.heads))


class GatedDeltaNet(DeltaRuleMixer):
    """The delta rule with one decay per head: ``P = a_t S_{t-1}``, ``S_t = P + beta_t k_t^T (v_t - k_t P)``.

    ``a_t = exp(-A softplus(W_a x + dt_bias))`` as in Mamba-2, ``beta = sigmoid(W_b x)``; queries, keys and values pass
    a short convolution and SiLU, queries and keys are made of unit norm; the output is ``norm(o) silu(W_g x)``.
    Yang et al. 2024, "Gated Delta Networks", section 3. Not Gated Linear Attention, which decays but does not
    overwrite. Projections have ``nn.Linear``'s initialisation; A is uniform in (0, 16) and dt_bias as in Mamba, both
    without weight decay.
    """

    Config = GatedDeltaNetConfig
    unquantized = ("ab_proj",)

    @from_options
    def __init__(self, config: GatedDeltaNetConfig, steps: int = 1):
        super().__init__(config, steps)
        heads, values = config.value_shape
        self.gate = Linear(config.d_model, heads * values, bias=False)
        self.ab_proj = Linear(config.d_model, (1 + steps) * heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1e-3, 16).log())
        self.dt_bias = nn.Parameter(step_size_bias(heads, config.dt_min, config.dt_max, config.dt_floor))
        self.norm = GatedRMSNorm(values, gate="after", eps=config.norm_eps)
        self.out_proj = Linear(heads * values, config.d_model, bias=False)

    def recurrence(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, recurrent: Tensor, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Tensor]:
        return ops.delta_rule(q, k, v, *self.rates(x), state=recurrent, cu_seqlens=cu_seqlens)

    def rates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """beta and the log decays, ``[B, T, H]`` each."""
        a, b = self.ab_proj(x).chunk(2, dim=-1)
        return self.beta(b), self.log_decay(a)
