"""Keys divided by what was written in each of their dimensions before: a diagonal preconditioner of the delta rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.delta_rule.base import DeltaRuleMixer, GatedDeltaRuleConfig
from seqarch.layers.mixer import Boundaries, Device
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.initialisation import step_size_bias
from seqarch.layers.modules.linear import Linear
from seqarch.ops.linear_attention import flops as sums_flops

EPS = 1e-6
"""Added to the curvature before its logarithm."""


@dataclass(frozen=True, kw_only=True)
class PreconditionedConfig(GatedDeltaRuleConfig):
    """Options of mixers whose keys are preconditioned.

    Attributes:
        squash: x; each dimension of a key is multiplied by a number from ``1 / x`` to x. Up to 2, the eigenvalues
            of a step along a key of unit norm stay within -1 and 1.
        neutral_curvature: at which that number is 1 at first; its logarithm is learnt, one of each head.
    """

    squash: float = 1.5
    neutral_curvature: float = math.exp(-0.2)

    def __post_init__(self):
        super().__post_init__()
        if not 1 < self.squash <= 2:
            raise ValueError(f"squash must be above 1 and at most 2, got {self.squash}")
        if self.negative_eigenvalues:
            raise ValueError("negative_eigenvalues with keys times up to squash would make the state grow")


class PreconditionedState(NamedTuple):
    """State of a mixer whose keys are preconditioned.

    Attributes:
        conv: the short convolution's last inputs, or ``None`` without one.
        recurrent: ``[B, H, K, V]``.
        curvature: the decayed sums of squares of keys, ``[B, G, 1, K]``, as wide as the recurrent state.
    """

    conv: Tensor | None
    recurrent: Tensor
    curvature: Tensor


class Preconditioner(nn.Module):
    """Keys times ``x^(-r / (1 + |r|))``, ``r = log A_t - c``, of the curvature ``A_t = g_t A_{t-1} + b_t k_t^2``.

    g and b are those of the delta rule's decay and beta, with weights of their own, one of each head of keys.
    """

    def __init__(self, config: PreconditionedConfig):
        super().__init__()
        self.groups, self.keys = config.key_shape
        self.log_squash = math.log(config.squash)
        self.rates = Linear(config.d_model, 2 * self.groups, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.groups).uniform_(1e-3, 16).log())
        self.dt_bias = nn.Parameter(step_size_bias(self.groups, config.dt_min, config.dt_max, config.dt_floor))
        self.center = nn.Parameter(torch.full((self.groups,), math.log(config.neutral_curvature)))

    def forward(self, x: Tensor, k: Tensor, curvature: Tensor, cu_seqlens: Boundaries) -> tuple[Tensor, Tensor]:
        """Keys ``[B, T, G, K]`` as they are written, and the curvature ``[B, G, 1, K]`` after them."""
        wide = curvature.dtype
        a, b = self.rates(x).to(wide).chunk(2, dim=-1)
        log_decay = -self.A_log.to(wide).exp() * F.softplus(a + self.dt_bias.to(wide))
        added = b.sigmoid().unsqueeze(-1) * k.to(wide).square()
        one = torch.ones_like(added[..., :1])
        # elementwise sums with one decay a head: linear attention whose keys are one wide
        sums, curvature = ops.linear_attention(
            one, one, added, log_decay, scale=1.0, state=curvature, cu_seqlens=cu_seqlens
        )
        r = (sums + EPS).log() - self.center.to(wide).unsqueeze(-1)
        return k * (-self.log_squash * r / (1 + r.abs())).exp().to(k.dtype), curvature

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Those of the sums; its linear map is counted where all are."""
        return sums_flops(length, self.groups, 1, self.keys, batch_size)


class Preconditioned(DeltaRuleMixer):
    """What a mixer on the delta rule gets in front of it, to write at preconditioned keys and read at its own."""

    takes_any_state = False

    rates: Callable[[Tensor], tuple[Tensor, Tensor]]
    """beta and the log decays, from the mixer's input."""

    @from_options
    def __init__(self, config: Any):
        super().__init__(config)
        self.preconditioner = Preconditioner(config)

    def over_time(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: PreconditionedState, cu_seqlens: Boundaries
    ) -> tuple[Tensor, PreconditionedState]:
        written, curvature = self.preconditioner(x, k, state.curvature, cu_seqlens)
        given = {"read": k, "state": state.recurrent, "cu_seqlens": cu_seqlens}
        o, recurrent = ops.delta_rule(q, written, v, *self.rates(x), **given)
        return o, state._replace(recurrent=recurrent, curvature=curvature)

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> Any:
        conv, recurrent = super().new_state(batch_size, max_length, device, dtype)
        groups, keys = self.config.key_shape
        return PreconditionedState(conv, recurrent, recurrent.new_zeros(batch_size, groups, 1, keys))

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return super().sequence_flops(length, batch_size) + self.preconditioner.flops(length, batch_size)
