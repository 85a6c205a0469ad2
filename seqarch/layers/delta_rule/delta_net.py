"""DeltaNet: linear attention that overwrites what a key held before."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqarch import ops
from seqarch.layers.delta_rule.base import DeltaRuleConfig, DeltaRuleMixer
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import HeadNorm


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(DeltaRuleConfig):
    """Options of :class:`DeltaNet`: those of all mixers on the delta rule."""


class DeltaNet(DeltaRuleMixer):
    """The delta rule without decay: ``S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1})``, ``o_t = q_t S_t / sqrt(K)``.

    Queries, keys and values pass a short convolution and SiLU, queries and keys are then made of unit norm,
    ``beta = sigmoid(W x)``, the output takes an RMS norm per head. Yang et al. 2024, "Parallelizing Linear Transformers
    with the Delta Rule over Sequence Length", section 3.3. It cannot forget on its own: for that see gated_delta_net.
    Projections have ``nn.Linear``'s initialisation (the release: normal with 0.02, the same scale at D = 833).
    """

    Config = DeltaNetConfig
    unquantized = ("beta_proj",)

    @from_options
    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        self.beta_proj = Linear(config.d_model, config.heads, bias=False)
        self.norm = HeadNorm(config.values, eps=config.norm_eps)
        self.out_proj = Linear(config.heads * config.values, config.d_model, bias=False)

    def recurrence(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, recurrent: Tensor, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Tensor]:
        return ops.delta_rule(q, k, v, self.beta(self.beta_proj(x)), state=recurrent, cu_seqlens=cu_seqlens)

    def gate_output(self, x: Tensor, o: Tensor) -> Tensor:
        return self.norm(o)
