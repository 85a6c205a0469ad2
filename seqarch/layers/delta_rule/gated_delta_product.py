"""Gated DeltaProduct: several delta steps per token."""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.delta_rule.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.ops.delta_rule import flops as recurrence_flops


@dataclass(frozen=True, kw_only=True)
class GatedDeltaProductConfig(GatedDeltaNetConfig):
    """Options of :class:`GatedDeltaProduct`: those of gated_delta_net, with negative eigenvalues on as in the release.

    Attributes:
        steps: n, delta steps per token, each with a key, a value and a beta of its own.
    """

    steps: int = 2
    negative_eigenvalues: bool = True


class GatedDeltaProduct(GatedDeltaNet):
    """n steps per token: ``P_0 = a_t S_{t-1}``, ``P_i = P_{i-1} + beta_i k_i^T (v_i - k_i P_{i-1})``, ``S_t = P_n``.

    With beta up to 2 a step is a reflection: two of them rotate a plane, n of them permute n + 1 things. Siems et al.
    2025, "DeltaProduct", section 3, with the decay of gated_delta_net, which is n = 1; gates, norms and initialisation
    are those of gated_delta_net. It runs as n tokens for one, of which the first decays and the last is read, at n
    times the recurrence's cost. Not more heads, which share no state.
    """

    Config = GatedDeltaProductConfig
    config: GatedDeltaProductConfig

    @from_options
    def __init__(self, config: GatedDeltaProductConfig):
        super().__init__(config, config.steps)

    def head_maps(self) -> list[HeadMap]:
        steps = {"k": self.config.steps, "v": self.config.steps}
        return [one for each in super().head_maps() for one in each.split(steps.get(each.role, 1))]

    def recurrence(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, recurrent: Tensor, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Tensor]:
        n, heads = self.config.steps, self.state_shape[0]
        # each token becomes n tokens of the delta rule, with a key, a value and a beta each: [B, n T, ...]
        a, b = self.ab_proj(x).split([heads, n * heads], dim=-1)
        k, v = (rearrange(m, "b t (n h) c -> b (t n) h c", n=n) for m in (k, v))
        beta = rearrange(self.beta(b), "b t (n h) -> b (t n) h", n=n)
        # the last of the n is read, the first decays; log decays of 0 leave the others as they are
        q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
        log_decay = F.pad(self.log_decay(a).unsqueeze(2), (0, 0, 0, n - 1)).flatten(1, 2)
        cu_seqlens = None if cu_seqlens is None else tuple(n * boundary for boundary in cu_seqlens)
        o, recurrent = ops.delta_rule(q, k, v, beta, log_decay, state=recurrent, cu_seqlens=cu_seqlens)
        return o[:, n - 1 :: n], recurrent

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return recurrence_flops(self.config.steps * length, *self.state_shape, batch_size=batch_size)
