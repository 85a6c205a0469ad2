"""A short convolution whose taps are made from the input, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.short_conv import ShortConvolution
from seqarch.ops.chunked.packing import over_sequences


class DynamicConvolution(ShortConvolution):
    """``y_t = silu(sum_w taps_t[w] x_{t - W + 1 + w})`` with taps ``W_2 silu(W_1 u_t) + b`` of each channel and token.

    As in Jet-Nemotron (Gu et al. 2025), after Wu et al. 2019, "Pay Less Attention with Lightweight and Dynamic
    Convolutions". Its state is the last ``W - 1`` inputs. b begins as the taps of a short convolution do, ``W_2`` with
    normal numbers of deviation .02 and ``W_1`` as ``nn.Linear`` does; where both are 0, as a generator in the release
    is made, neither gets a gradient.

    Args:
        channels: of x.
        width: W, 2 to 8.
        source: channels of u.
        rank: channels between ``W_1`` and ``W_2``.
    """

    def __init__(self, channels: int, width: int, source: int, rank: int):
        super().__init__(channels, width, "silu")
        first, second = Linear(source, rank, bias=False), Linear(rank, channels * width)
        nn.init.normal_(second.weight, std=0.02)
        second.bias = nn.Parameter(self.weight.detach().flatten())
        del self.weight
        self.taps = nn.Sequential(first, nn.SiLU(), second)

    def forward(  # type: ignore[override]
        self, x: Tensor, u: Tensor, state: Tensor, cu_seqlens: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x [B, T, channels]`` and what its taps are made of ``[B, T, source]``, from a state on."""
        taps = self.taps(u).unflatten(-1, (self.channels, self.width))
        y, state = over_sequences(_convolve, None if cu_seqlens is None else tuple(cu_seqlens), state, x, taps)
        return F.silu(y), state

    def flops(self, length: int, batch_size: int = 1) -> int:
        """0: products of taps and inputs are elementwise work; the maps that make the taps are linear maps."""
        return 0


def _convolve(state: Tensor, x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    history, length = torch.cat([state.to(x.dtype), x], dim=1), x.shape[1]
    y = sum(history[:, w : w + length] * taps[..., w] for w in range(taps.shape[-1]))
    return y, history[:, length:].clone()  # type: ignore[return-value]
