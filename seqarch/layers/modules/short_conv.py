"""The short convolution that many mixers place between their projections and their recurrence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seqarch import ops
from seqarch.ops.causal_conv1d import flops as conv_flops


class ShortConvolution(nn.Module):
    """A depthwise causal convolution of width W over ``[B, T, D]``; its state is the last ``W - 1`` inputs.

    Initialised as ``nn.Conv1d`` is (uniform in ``+-1 / sqrt(W)``), which is what the reference releases use.

    Args:
        channels: D.
        width: W, 2 to 8.
        activation: ``None`` or ``"silu"``.
        bias: whether a bias is added before the activation.
    """

    def __init__(self, channels: int, width: int, activation: str | None = None, bias: bool = False):
        super().__init__()
        if not 2 <= width <= 8:
            raise ValueError(f"conv_width: a short convolution has a width of 2 to 8, got {width}")
        self.channels, self.width, self.activation = channels, width, activation
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        return ops.causal_conv1d(
            x, self.weight, self.bias, activation=self.activation, state=state, cu_seqlens=cu_seqlens
        )

    @torch.no_grad()
    def make_identity(self) -> None:
        """Let every channel be what it is at its own token, before the activation: as if there were no convolution."""
        self.weight.zero_()[:, -1] = 1
        if self.bias is not None:
            self.bias.zero_()

    def init_state(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch_size, self.width - 1, self.channels, device=device, dtype=dtype)

    def flops(self, length: int, batch_size: int = 1) -> int:
        return conv_flops(length, self.channels, self.width, batch_size)
