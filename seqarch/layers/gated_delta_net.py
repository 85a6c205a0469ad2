"""Gated DeltaNet: the delta rule with a learnt decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.heads import HeadProjection
from seqarch.layers.initialisation import step_size_bias
from seqarch.layers.mixer import LayerConfig, choose_heads, linear_flops
from seqarch.layers.norms import GatedRMSNorm, l2_normalise
from seqarch.layers.recurrent import RecurrentMixer, RecurrentState
from seqarch.ops.delta_rule import flops as recurrence_flops


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(LayerConfig):
    """Options of :class:`GatedDeltaNet`.

    Attributes:
        num_heads: H; by default ``D / 64`` (``D / 32`` where 64 does not divide D).
        key_width: K; by default ``3 D / (4 H)``, so that the mixer has about ``6 D^2`` parameters as in the release.
        expand_v: V is ``expand_v K``.
        conv_width: width of the short convolutions over queries, keys and values; 0 for none.
        negative_eigenvalues: doubles beta to (0, 2), which lets the model track state (Grazzi et al. 2024).
        dt_min, dt_max, dt_floor: range of the initial step sizes of the decay.
    """

    num_heads: int | None = None
    key_width: int | None = None
    expand_v: int = 2
    conv_width: int = 4
    negative_eigenvalues: bool = False
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        choose_heads(self.d_model, self.num_heads)


class GatedDeltaNet(RecurrentMixer):
    """The delta rule with one decay a head: ``P = a_t S_{t-1}``, ``S_t = P + beta_t k_t^T (v_t - k_t P)``.

    ``a_t = exp(-A softplus(W_a x + dt_bias))`` as in Mamba-2, ``beta = sigmoid(W_b x)``; queries, keys and values pass
    a short convolution and SiLU, queries and keys are made of unit norm; the output is ``norm(o) silu(W_g x)``.
    Yang et al. 2024, "Gated Delta Networks", section 3. Not Gated Linear Attention, which decays but does not
    overwrite. Projections have ``nn.Linear``'s initialisation; A is uniform in (0, 16) and dt_bias as in Mamba, both
    without weight decay.
    """

    Config = GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig):
        super().__init__()
        self.config = config
        num_heads = choose_heads(config.d_model, config.num_heads)
        keys = config.key_width or max(1, 3 * config.d_model // (4 * num_heads))
        values = config.expand_v * keys
        parts = [(num_heads, keys), (num_heads, keys), (num_heads, values)]
        self.heads = HeadProjection(config.d_model, parts, config.conv_width, "silu")
        self.gate = nn.Linear(config.d_model, num_heads * values, bias=False)
        self.rates = nn.Linear(config.d_model, 2 * num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1e-3, 16).log())
        bias = step_size_bias(num_heads, config.dt_min, config.dt_max, config.dt_floor)
        self.dt_bias = nn.Parameter(bias)
        self.norm = GatedRMSNorm(values, gate="after")
        self.output = nn.Linear(num_heads * values, config.d_model, bias=False)
        self.memory_shape = (num_heads, keys, values)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, RecurrentState]:
        conv, memory = (None, None) if state is None else state
        (q, k, v), conv = self.heads(x, conv, cu_seqlens)
        a, b = self.rates(x).chunk(2, dim=-1)
        beta = b.sigmoid() * (2 if self.config.negative_eigenvalues else 1)
        wide = self.memory_dtype
        log_decay = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias.to(wide))
        o, memory = ops.delta_rule(
            l2_normalise(q), l2_normalise(k), v, beta, log_decay, state=memory, cu_seqlens=cu_seqlens
        )
        o = self.norm(o, rearrange(self.gate(x), "b t (h v) -> b t h v", v=o.shape[-1]))
        return self.output(rearrange(o, "b t h v -> b t (h v)")), RecurrentState(conv, memory)

    def flops(self, length: int, batch_size: int = 1) -> int:
        tokens = batch_size * length
        own = sum(linear_flops(linear, tokens) for linear in (self.gate, self.rates, self.output))
        return (
            own
            + self.heads.flops(length, batch_size)
            + recurrence_flops(length, *self.memory_shape, batch_size=batch_size)
        )
