"""Kimi delta attention (KDA): the delta rule with a learnt decay for every key dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.delta_rule.base import DeltaRuleMixer, GatedDeltaRuleConfig
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.initialisation import step_size_bias
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import GatedRMSNorm


@dataclass(frozen=True, kw_only=True)
class KDAConfig(GatedDeltaRuleConfig):
    """Options of :class:`KDA`.

    Attributes:
        gate_rank: rank of the maps from the input to the decays and to the output gate; by default V.
        log_decay_bound: log decays are above minus this, ``-bound sigmoid(A (W_2 W_1 x + dt_bias))``, so that a step
            keeps at least ``exp(-bound)``; GLM-5-Next has 5. ``None`` for decays without a bound.
    """

    gate_rank: int | None = None
    log_decay_bound: float | None = None


class KDA(DeltaRuleMixer):
    """The delta rule, a decay per key dimension: ``P = diag(a_t) S_{t-1}``, ``S_t = P + beta_t k_t^T (v_t - k_t P)``.

    ``a_t = exp(-A softplus(W_2 W_1 x + dt_bias))`` with one A per head, ``beta = sigmoid(W_b x)``; queries, keys and
    values pass a short convolution and SiLU, queries and keys are made of unit norm; the output is ``norm(o)
    sigmoid(W_4 W_3 x)``. Zhang et al. 2025, "Kimi Linear", sections 3 and 4. Not gated_delta_net, which has one decay
    per head and a full gate with SiLU. Projections have ``nn.Linear``'s initialisation; A is uniform in (1, 16), or 1
    with ``log_decay_bound``, and dt_bias as in Mamba, both without weight decay.
    """

    Config = KDAConfig
    config: KDAConfig
    unquantized = ("decay", "beta_proj")

    @from_options
    def __init__(self, config: KDAConfig, betas: int | None = None):
        super().__init__(config)
        d_model, (heads, values), keys = config.d_model, config.value_shape, config.key_shape[1]
        rank = config.gate_rank or values
        self.decay = nn.Sequential(Linear(d_model, rank, bias=False), Linear(rank, heads * keys, bias=False))
        self.gate = nn.Sequential(Linear(d_model, rank, bias=False), Linear(rank, heads * values, bias=False))
        self.beta_proj = Linear(d_model, betas or heads, bias=False)
        rate = torch.empty(heads).uniform_(1, 16) if config.log_decay_bound is None else torch.ones(heads)
        self.A_log = nn.Parameter(rate.log())
        self.dt_bias = nn.Parameter(step_size_bias(heads * keys, config.dt_min, config.dt_max, config.dt_floor))
        self.norm = GatedRMSNorm(values, gate="after", eps=config.norm_eps, activation="sigmoid")
        self.out_proj = Linear(heads * values, d_model, bias=False)

    def decays(self, x: Tensor) -> Tensor:
        """The log decays, ``[B, T, H, K]``."""
        return self.log_decay(rearrange(self.decay(x), "b t (h k) -> b t h k", h=self.state_shape[0]))

    def log_decay(self, logits: Tensor) -> Tensor:
        bound = self.config.log_decay_bound
        if bound is None:
            return super().log_decay(logits)
        wide = self.state_dtype
        return -bound * (self.A_log.to(wide).exp().unsqueeze(-1) * self.shifted(logits)).sigmoid()

    def rates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """beta ``[B, T, H]`` and the log decays."""
        return self.beta(self.beta_proj(x)), self.decays(x)

    def recurrence(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, recurrent: Tensor, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Tensor]:
        return ops.delta_rule(q, k, v, *self.rates(x), state=recurrent, cu_seqlens=cu_seqlens)
