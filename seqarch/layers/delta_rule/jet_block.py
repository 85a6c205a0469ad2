"""The Jet block: Gated DeltaNet with a dynamic convolution over its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from seqarch.layers.delta_rule.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.dynamic_conv import DynamicConvolution
from seqarch.layers.modules.heads import HeadProjection


@dataclass(frozen=True, kw_only=True)
class JetBlockConfig(GatedDeltaNetConfig):
    """Options of :class:`JetBlock`.

    Attributes:
        conv_width: width of the dynamic convolution over values, 2 to 8.
        tap_reduction: taps are made by way of ``D / tap_reduction`` channels, but one at least.
    """

    tap_reduction: int = 8

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.conv_width <= 8:
            raise ValueError(f"conv_width: a dynamic convolution has a width of 2 to 8, got {self.conv_width}")


class JetProjection(HeadProjection):
    """Queries and keys ``silu(W x)``, and values that pass a dynamic convolution, each in heads.

    Args:
        d_model: D.
        parts: heads and width of queries, keys and values.
        width, rank: of the convolution, and what its taps are made by way of.
    """

    def __init__(self, d_model: int, parts: Sequence[tuple[int, int]], width: int, rank: int):
        super().__init__(d_model, parts)
        self.conv = DynamicConvolution(self.sizes[-1], width, d_model, rank)

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        q, k, v = self.linear(x).split(self.sizes, dim=-1)
        v, state = self.conv(v, x, state, cu_seqlens)
        pieces = zip((F.silu(q), F.silu(k), v), self.parts, strict=True)
        return [piece.unflatten(-1, part) for piece, part in pieces], state


class JetBlock(GatedDeltaNet):
    """Gated DeltaNet's recurrence on values ``u_t = silu(sum_w c_tw v_{t-w})`` whose taps c are made from the token.

    Queries and keys are ``silu(W x)``, without a convolution, of unit norm; the taps of each channel of the values are
    ``W_2 silu(W_1 x_t) + b``. Gu et al. 2025, "Jet-Nemotron: Efficient Language Model with Post Neural Architecture
    Search", section 3.2. Not Gated DeltaNet, whose short convolutions have fixed taps and cover queries and keys. Taps
    begin as :class:`~seqarch.layers.modules.dynamic_conv.DynamicConvolution` says, all else as in Gated DeltaNet.
    """

    Config = JetBlockConfig
    config: JetBlockConfig
    unquantized = ("ab_proj", "taps")

    @from_options
    def __init__(self, config: JetBlockConfig):
        super().__init__(config)

    def projection(self, parts: list[tuple[int, int]]) -> HeadProjection:
        config = self.config
        rank = max(1, config.d_model // config.tap_reduction)
        return JetProjection(config.d_model, parts, config.conv_width, rank)
