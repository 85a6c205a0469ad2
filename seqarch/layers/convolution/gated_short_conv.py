"""The gated short convolution of LFM2: a few taps between two gates, and nothing else along time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from seqarch.layers.mixer import Boundaries, Device, LayerConfig, Mixer, first_tensor, measured_state_bytes
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.short_conv import ShortConvolution


@dataclass(frozen=True, kw_only=True)
class GatedShortConvConfig(LayerConfig):
    """Options of :class:`GatedShortConv`.

    Attributes:
        conv_width: W, width of the convolution, 2 to 8.
        bias: whether the projections and the convolution have biases.
    """

    may_be_zero: ClassVar[tuple[str, ...]] = ()

    conv_width: int = 3
    bias: bool = False


class GatedShortConvState(NamedTuple):
    """State of a gated short convolution.

    Attributes:
        conv: the convolution's last inputs ``[B, W - 1, D]``.
    """

    conv: Tensor


class GatedShortConv(Mixer):
    """``y = W_o (C * conv(B * u))`` with ``[B, C, u] = W_i x``, and no activation anywhere.

    Two gates and a depthwise convolution of width W, so that a token sees W - 1 before it. Amini et al. 2025, "LFM2
    Technical Report", as released. Not Hyena, whose convolutions are as long as the sequence: LFM2 has attention in
    some layers for what lies further back. Projections and convolution have the initialisation of ``nn.Linear`` and
    ``nn.Conv1d``.
    """

    Config = GatedShortConvConfig

    @from_options
    def __init__(self, config: GatedShortConvConfig):
        super().__init__(config)
        width = config.d_model
        self.in_proj = Linear(width, 3 * width, bias=config.bias)
        self.conv = ShortConvolution(width, config.conv_width, bias=config.bias)
        self.out_proj = Linear(width, width, bias=config.bias)

    def mix(self, x: Tensor, state: GatedShortConvState, cu_seqlens: Boundaries) -> tuple[Tensor, GatedShortConvState]:
        before, after, u = self.in_proj(x).chunk(3, dim=-1)
        y, conv = self.conv(before * u, state.conv, cu_seqlens)
        return self.out_proj(after * y), GatedShortConvState(conv)

    def new_state(
        self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None
    ) -> GatedShortConvState:
        like = first_tensor(self)
        return GatedShortConvState(self.conv.init_state(batch_size, device or like.device, dtype or like.dtype))

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        return batch_size * measured_state_bytes(self.init_state(1, device="meta"))

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return 0
