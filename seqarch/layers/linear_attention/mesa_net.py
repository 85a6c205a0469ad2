"""MesaNet: every token reads the least-squares fit of the values to the keys up to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import HeadNorm, l2_normalise


@dataclass(frozen=True, kw_only=True)
class MesaNetConfig(RidgeRegressionConfig):
    """Options of :class:`MesaNet`.

    Attributes:
        least_ridge: what Lambda is at least.
        first_ridge: what it is at first, above ``least_ridge``.
        gate_bias: initial bias of the decays' logits, larger forgets more slowly; by default ``nn.Linear``'s, with
            which half is forgotten in about a token.
    """

    slow_gates: ClassVar[dict[str, float]] = {"gate_bias": 6.0}

    least_ridge: float = 0.25
    first_ridge: float = 1.0
    gate_bias: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.first_ridge <= self.least_ridge:
            raise ValueError(f"first_ridge ({self.first_ridge}) must be above least_ridge ({self.least_ridge})")


class MesaNet(RidgeRegression):
    """``o_t = ((H_t + Lambda)^-1 q_t) G_t``, ``H_t = a_t H_{t-1} + b_t k_t^T k_t``, G_t alike of ``b_t k_t^T v_t``.

    That is what the matrix that minimises ``sum_s (decayed b_s) |v_s - k_s W|^2`` with the ridge Lambda makes of the
    query. ``a = sigmoid(W_a x + c)`` and ``b = sigmoid(W_b x + d)``, one of each head; ``Lambda = .25 + softplus``, a
    learnt diagonal of each head. Queries and keys pass a short convolution and SiLU and are made of unit norm; the
    output is an RMS norm of each head. Von Oswald et al. 2025, "MesaNet: Sequence Modeling by Locally Optimal
    Test-Time Training", sections 2 and 3. Not the delta rule, which makes one step of gradient descent on the same loss
    at every token, and not gla, which reads G_t by the query itself. Conjugate gradients begin at 0, as in the
    release's chunked form, where decoding there begins at ``q / (diag(H) + Lambda)``. Projections have ``nn.Linear``'s
    initialisation.
    """

    Config = MesaNetConfig
    unquantized = ("decay", "rate")
    no_weight_decay = ("ridge",)

    @from_options
    def __init__(self, config: MesaNetConfig):
        super().__init__(config)
        heads, keys, values = self.state_shape
        self.qk_proj = HeadProjection(config.d_model, [(heads, keys)] * 2, config.conv_width, "silu")
        self.value = HeadProjection(config.d_model, [(heads, values)])
        self.decay, self.rate = Linear(config.d_model, heads), Linear(config.d_model, heads)
        if config.gate_bias is not None:
            nn.init.constant_(self.decay.bias, config.gate_bias)
        self.ridge = nn.Parameter(
            torch.full((heads, keys), math.log(math.expm1(config.first_ridge - config.least_ridge)))
        )
        self.norm = HeadNorm(values, config.norm_eps)
        self.out_proj = Linear(heads * values, config.d_model, bias=False)

    def head_maps(self) -> list[HeadMap]:
        heads, _, values = self.state_shape
        own = [*self.qk_proj.head_maps("qk_proj", "qk"), *self.value.head_maps("value", "v")]
        return [*own, HeadMap("o", "out_proj", heads, values)]

    def project(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> Projected:
        (q, k), conv = self.qk_proj(x, state.conv, cu_seqlens)
        (v,), _ = self.value(x)
        wide = self.state_dtype
        q, k = l2_normalise(q.to(wide)), l2_normalise(k.to(wide))
        written = self.rate(x).to(wide).sigmoid().unsqueeze(-1) * k
        ridge = F.softplus(self.ridge.to(wide)) + self.config.least_ridge
        log_decay = F.logsigmoid(self.decay(x).to(wide))
        return Projected(q, v.to(wide), Covariance(k, written, log_decay, ridge, state.covariance), conv)

    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        return self.norm(o)
