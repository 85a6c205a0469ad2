"""Stick-breaking attention: each token, from the last on, takes its share of what the later ones left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from seqarch import ops
from seqarch.layers.attention.base import CachedAttention, CachedAttentionConfig
from seqarch.ops.stick_breaking_attention import flops as stick_breaking_flops


@dataclass(frozen=True, kw_only=True)
class StickBreakingAttentionConfig(CachedAttentionConfig):
    """Options of :class:`StickBreakingAttention`.

    Attributes:
        position: ``"none"``, as in the paper, where the later of two keys counts more; or ``"rotary"``.
    """

    position: str = "none"


class StickBreakingAttention(CachedAttention):
    """``o_i = r_i v_i + sum_{j < i} A_ij v_j``, ``A_ij = s_ij prod_{j < l < i} (1 - s_il)``.

    ``s_ij = sigmoid(q_i . k_j / sqrt(K))``, and ``r_i = prod_{j < i} (1 - s_ij)`` is what the tokens before i have
    left, which goes to the token itself. Tan et al. 2024, "Scaling Stick-Breaking Attention", section 3. Not softmax
    attention, whose weights do not depend on the order of keys: here a token hides those before it, and by default
    there are no positions. Not forgetting attention, whose gates are the same for all queries. Projections have
    ``nn.Linear``'s initialisation.
    """

    Config = StickBreakingAttentionConfig

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *selection: Tensor, **where: Any) -> Tensor:
        o, rest = ops.stick_breaking_attention(q, k, v, **where)
        own = v[:, v.shape[1] - q.shape[1] :].repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        return o + (rest.unsqueeze(-1) * own).to(o.dtype)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        heads, width = self.config.heads, self.config.head_width
        return stick_breaking_flops(length, length, heads, width, width, batch_size)
