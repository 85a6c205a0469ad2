"""Preconditioned Kimi delta attention: KDA that writes less where much was written before."""

from __future__ import annotations

from dataclasses import dataclass

from seqarch.layers.delta_rule.kda import KDA, KDAConfig
from seqarch.layers.delta_rule.preconditioning import Preconditioned, PreconditionedConfig


@dataclass(frozen=True, kw_only=True)
class PreconditionedKDAConfig(PreconditionedConfig, KDAConfig):
    """Options of :class:`PreconditionedKDA`."""


class PreconditionedKDA(Preconditioned, KDA):
    """``P = diag(a_t) S_{t-1}``, ``S_t = P + beta_t p_t^T (v_t - k_t P)``, ``p_t = k_t x^(-r_t / (1 + |r_t|))``.

    ``r_t = log A_t - c`` with ``A_t = g_t A_{t-1} + b_t k_t^2``, elementwise. g and b are gates of each head, as in
    preconditioned_gated_delta_net; the state's decay a is one of each key dimension. Tumma et al. 2026,
    "Preconditioned DeltaNet", section 3. Not kda, which writes at the keys that it reads. All else is KDA's, also at
    first.
    """

    Config = PreconditionedKDAConfig
    unquantized = ("decay", "beta_proj", "preconditioner")
