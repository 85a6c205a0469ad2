"""Preconditioned Gated DeltaNet: a gated delta rule that writes less where much was written before."""

from __future__ import annotations

from dataclasses import dataclass

from seqarch.layers.delta_rule.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from seqarch.layers.delta_rule.preconditioning import Preconditioned, PreconditionedConfig


@dataclass(frozen=True, kw_only=True)
class PreconditionedGatedDeltaNetConfig(PreconditionedConfig, GatedDeltaNetConfig):
    """Options of :class:`PreconditionedGatedDeltaNet`."""


class PreconditionedGatedDeltaNet(Preconditioned, GatedDeltaNet):
    """``P = a_t S_{t-1}``, ``S_t = P + beta_t p_t^T (v_t - k_t P)``, ``p_t = k_t x^(-r_t / (1 + |r_t|))``.

    ``r_t = log A_t - c`` with ``A_t = g_t A_{t-1} + b_t k_t^2``, elementwise: keys are written less in dimensions in
    which much was written. g and b are gates as a and beta are, one a head, with weights of their own; c is learnt.
    Tumma et al. 2026, "Preconditioned DeltaNet", section 3: a diagonal approximation of what least squares divide by.
    Not comba, which changes what is read: here the correction reads at k and is written at p. All else is Gated
    DeltaNet's, also at first; the gates g begin as a does.
    """

    Config = PreconditionedGatedDeltaNetConfig
    unquantized = ("ab_proj", "preconditioner")
