"""Log-linear Gated DeltaNet: Gated DeltaNet whose state is one for each power of two of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqarch import ops
from seqarch.layers.delta_rule.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.log_linear import LevelsConfig, LogLinear, LogLinearState


@dataclass(frozen=True, kw_only=True)
class LogLinearGatedDeltaNetConfig(LevelsConfig, GatedDeltaNetConfig):
    """Options of :class:`LogLinearGatedDeltaNet`."""


class LogLinearGatedDeltaNet(LogLinear, GatedDeltaNet):
    """``o_t = sum_l w_tl q_t S_t^l / sqrt(K)``, ``S_t^l = a_t (I - beta_t k_t^T k_t) S_{t-1}^l`` of level l before t.

    Level 0 is the token itself, ``beta_t k_t^T v_t``; level l holds ``2^(l-1)`` tokens, those that lie further back the
    more of them together, where bit ``l - 1`` of the position t is set: at most ``1 + log2 t`` states, a binary
    counter. Every token decays and corrects all of them. ``w_tl = softplus(s_l W_l x_t)`` for each head and level,
    with learnt s that are 1 at first; all else is Gated DeltaNet's. Guo et al. 2025, "Log-Linear Attention", section
    3.3. Not Gated DeltaNet, which reads one state, the sum of these; nor gated_delta_product, which takes several
    steps of one state. A token after t meets as many states as t has bits that are set: one after a power of two, half
    of ``log2 t`` on average. Tokens beyond ``levels`` are refused.
    """

    Config = LogLinearGatedDeltaNetConfig
    unquantized = ("ab_proj", "level_proj")
    delta = True

    def over_time(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: LogLinearState, cu_seqlens: Boundaries
    ) -> tuple[Tensor, LogLinearState]:
        given = {"state": state.recurrent, "before": state.lengths, "cu_seqlens": cu_seqlens}
        o, recurrent = ops.log_linear_attention(q, k, v, self.level_weight(x), *self.rates(x), **given)
        return o, state.after(recurrent, x.shape[1], cu_seqlens)
