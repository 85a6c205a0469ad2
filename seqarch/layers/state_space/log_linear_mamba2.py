"""Log-linear Mamba-2: Mamba-2 whose state is one for each power of two of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from seqarch import ops
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.log_linear import LevelsConfig, LogLinear, LogLinearState
from seqarch.layers.state_space.mamba2 import Mamba2, Mamba2Config


@dataclass(frozen=True, kw_only=True)
class LogLinearMamba2Config(LevelsConfig, Mamba2Config):
    """Options of :class:`LogLinearMamba2`."""


class LogLinearMamba2(LogLinear, Mamba2):
    """``y_t = sum_l w_tl C_t h_t^l + D x_t``, ``h_t^l = exp(dt_t A) h_{t-1}^l`` of the tokens of level l before t.

    Level 0 is the token itself, ``dt_t B_t x_t``; level l holds ``2^(l-1)`` tokens, those that lie further back the
    more of them together, where bit ``l - 1`` of the position t is set: at most ``1 + log2 t`` states, a binary
    counter. ``w_tl = softplus(s_l W_l x_t)`` for each head and level, with learnt s that are 1 at first; all else is
    Mamba-2's.
    Guo et al. 2025, "Log-Linear Attention", section 3.3. Not Mamba-2 with a larger state: how much is held grows with
    the logarithm of the length, and what is near is held apart. A token after t reads as many states as t has bits that
    are set: one after a power of two, half of ``log2 t`` on average. Tokens beyond ``levels`` are refused.
    """

    Config = LogLinearMamba2Config
    unquantized = ("level_proj",)
    delta = False

    def over_time(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: LogLinearState,
        cu_seqlens: Boundaries,
    ) -> tuple[Tensor, LogLinearState]:
        attend = partial(ops.log_linear_attention, level_weight=self.level_weight(x), before=state.lengths)
        given = {"scale": 1.0, "state": state.recurrent, "cu_seqlens": cu_seqlens}
        y, recurrent = self.signed(attend)(q, k, v, log_decay=log_decay, **given)
        return y, state.after(recurrent, x.shape[1], cu_seqlens)
