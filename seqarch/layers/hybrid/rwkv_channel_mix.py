"""RWKV's channel mixing: an MLP on a mixture of a token and the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqarch.layers.channel.mlp import HiddenConfig
from seqarch.layers.mixer import Boundaries, Device, Mixer, first_tensor, measured_state_bytes
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.token_shift import DEPTH, TokenShift
from seqarch.ops.experts.activations import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class RwkvChannelMixConfig(HiddenConfig):
    """Options of :class:`RwkvChannelMix`."""

    activation: str = "squared_relu"


class RwkvChannelMixState(NamedTuple):
    """State of :class:`RwkvChannelMix`.

    Attributes:
        conv: the last token's input ``[B, 1, D]``.
    """

    conv: Tensor


class RwkvChannelMix(Mixer):
    """``y_t = act((x_t + (x_{t-1} - x_t) * share) W_in) W_out``, with a learnt share per channel.

    Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", section 4, as released: the other half of
    RWKV-7's blocks. It stands in a pattern as a mixer, ``rwkv7/none rwkv_channel_mix/none``, since it reads the token
    before and so has a state. Not RWKV-6's channel mixing, which has a gate besides. Shares are the release's at half
    the depth; the maps have ``nn.Linear``'s initialisation, instead of orthogonal and zero.
    """

    Config = RwkvChannelMixConfig

    @from_options
    def __init__(self, config: RwkvChannelMixConfig):
        super().__init__(config)
        size = config.d_model
        self.shift = TokenShift(size)
        self.share = nn.Parameter(1 - (torch.arange(size) / size) ** ((1 - DEPTH) ** 4))
        self.in_proj = Linear(size, config.hidden_width, bias=False)
        self.out_proj = Linear(config.hidden_width, size, bias=False)

    def mix(self, x: Tensor, state: RwkvChannelMixState, cu_seqlens: Boundaries) -> tuple[Tensor, RwkvChannelMixState]:
        before, last = self.shift(x, state.conv, cu_seqlens)
        hidden = self.in_proj(torch.lerp(x, before, self.share.to(x.dtype)))
        return self.out_proj(ACTIVATIONS[self.config.activation](hidden)), RwkvChannelMixState(last)

    def new_state(
        self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None
    ) -> RwkvChannelMixState:
        like = first_tensor(self)
        return RwkvChannelMixState(self.shift.init_state(batch_size, device or like.device, dtype or like.dtype))

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        return batch_size * measured_state_bytes(self.init_state(1, device="meta"))

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return 0
