"""Gated KalmaNet (GKA): a fading ridge regression whose ridge grows with what it is added to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.linear_attention.ridge_regression import (
    Covariance,
    Projected,
    RidgeRegression,
    RidgeRegressionConfig,
)
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadProjection
from seqarch.layers.modules.initialisation import step_size_bias
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import GatedRMSNorm, l2_normalise
from seqarch.ops.linear_attention import flops as linear_attention_flops

LEAST_RATE = 1e-6
"""Added to the rates, so that something is written."""

LEAST_SQUARE = 1e-30
"""Added to the squared norm of H, which is 0 where nothing was written."""


@dataclass(frozen=True, kw_only=True)
class GatedKalmaNetConfig(RidgeRegressionConfig):
    """Options of :class:`GatedKalmaNet`.

    Attributes:
        iterations: of conjugate gradients, the same for every token, in training as in decoding; with 40, 32 keys are
            solved to the rounding of float64, 64 keys to 1e-11; with 50, these to the rounding as well.
        ridge_ratio: the ridge as a share of the Frobenius norm of H.
        dt_min, dt_max, dt_floor: range of the initial step sizes of the decay.
    """

    slow_gates: ClassVar[dict[str, float]] = {"dt_min": 1e-4, "dt_max": 1e-3}

    iterations: int = 40
    ridge_ratio: float = 0.02
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4


class GatedKalmaNet(RidgeRegression):
    """``o_t = (q_t + g_t (x_t - q_t)) G_t / sqrt(K)``, ``(H_t + r_t) x_t = q_t``, ``r_t = .02 |H_t|``.

    ``H_t = a_t H_{t-1} + (b_t k_t)^T (b_t k_t)``, ``G_t = a_t G_{t-1} + (b_t k_t)^T (b_t v_t)``, ``|H|`` the Frobenius
    norm; ``a = exp(-A softplus(W_a x + dt_bias))`` as in Gated DeltaNet, ``b = sigmoid(W_b x + d)`` and
    ``g = sigmoid(W_g x + e)``, one of each head. Queries, keys and values pass a short convolution and SiLU, queries
    and keys are made of unit norm; the output is ``norm(o) silu(W_z x)``. Peng et al. 2025, "Gated KalmaNet: A Fading
    Memory Layer Through Test-Time Ridge Regression", sections 3 and 4. Not MesaNet, whose ridge is learnt and the same
    at every token, so that it is lost beside a state that grows; here no system is worse conditioned than
    ``1 + 1 / .02``. The paper takes 30 steps of Chebyshev's iteration, which may leave 4e-4 of x; here it is
    conjugate gradients. Projections have ``nn.Linear``'s initialisation; A is uniform in (0, 16).
    """

    Config = GatedKalmaNetConfig
    unquantized = ("decay", "rates")

    @from_options
    def __init__(self, config: GatedKalmaNetConfig):
        super().__init__(config)
        heads, keys, values = self.state_shape
        parts = [(heads, keys), (heads, keys), (heads, values)]
        self.qkv_proj = HeadProjection(config.d_model, parts, config.conv_width, "silu")
        self.decay = Linear(config.d_model, heads, bias=False)
        self.rates = Linear(config.d_model, heads)
        self.mixing = Linear(config.d_model, heads)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1e-3, 16).log())
        self.dt_bias = nn.Parameter(step_size_bias(heads, config.dt_min, config.dt_max, config.dt_floor))
        self.gate = Linear(config.d_model, heads * values, bias=False)
        self.norm = GatedRMSNorm(values, gate="after", eps=config.norm_eps)
        self.out_proj = Linear(heads * values, config.d_model, bias=False)

    def head_maps(self) -> list[HeadMap]:
        heads, _, values = self.state_shape
        return [*self.qkv_proj.head_maps("qkv_proj"), HeadMap("o", "out_proj", heads, values)]

    def project(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> Projected:
        (q, k, v), conv = self.qkv_proj(x, state.conv, cu_seqlens)
        wide = self.state_dtype
        b = (self.rates(x).to(wide).sigmoid() + LEAST_RATE).unsqueeze(-1)
        q, k, v = l2_normalise(q.to(wide)), b * l2_normalise(k.to(wide)), b * v.to(wide)
        log_decay = -self.A_log.to(wide).exp() * F.softplus(self.decay(x).to(wide) + self.dt_bias.to(wide))
        ridge = self.config.ridge_ratio * self._norms(k, log_decay, state.covariance, cu_seqlens)
        written = k.view_as(k)  # compilers take no tensor twice among those of a gradient of one's own
        return Projected(q, v, Covariance(k, written, log_decay, ridge, state.covariance), conv)

    def _norms(self, k: Tensor, log_decay: Tensor, covariance: Tensor, cu_seqlens: Boundaries) -> Tensor:
        """``|H_t|`` of every token, ``[B, T, H, 1]``: ``|H_t|^2 = a^2 |H_{t-1}|^2 + 2 k H_t k^T - |k|^4``."""
        given = {"scale": 1.0, "cu_seqlens": cu_seqlens}
        read, _ = ops.linear_attention(k, k, k, log_decay, state=covariance, **given)
        added = 2 * (read * k).sum(-1, keepdim=True) - k.square().sum(-1, keepdim=True).square()
        one, before = torch.ones_like(added), covariance.square().sum((-1, -2)).unsqueeze(-1).unsqueeze(-1)
        squares, _ = ops.linear_attention(one, one, added, 2 * log_decay, state=before, **given)
        return (squares + LEAST_SQUARE).sqrt()

    def read(self, x: Tensor, q: Tensor, solved: Tensor) -> Tensor:
        share = self.mixing(x).to(q.dtype).sigmoid().unsqueeze(-1)
        return torch.lerp(q, solved, share) * q.shape[-1] ** -0.5

    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        return self.norm(o, rearrange(self.gate(x), "b t (h v) -> b t h v", v=o.shape[-1]))

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        heads, keys, _ = self.state_shape
        norms = linear_attention_flops(length, heads, keys, keys, batch_size)
        norms += linear_attention_flops(length, heads, 1, 1, batch_size)
        return super().sequence_flops(length, batch_size) + norms
