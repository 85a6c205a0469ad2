"""The short convolution that many mixers place between their projections and their recurrence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seqarch import ops
from seqarch.ops.causal_conv1d import flops as conv_flops
from seqarch.ops.common.token_cpp import Program, Slot, Value


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
        self.activation = activation
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        return ops.causal_conv1d(
            x, self.weight, self.bias, activation=self.activation, state=state, cu_seqlens=cu_seqlens
        )

    def one_token(self, program: Program, x: Value, state: Slot) -> Value:
        return program.convolve(x, self.weight, self.bias, state, self.activation)

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        channels, width = self.weight.shape
        return torch.zeros(
            batch_size, width - 1, channels, device=device or self.weight.device, dtype=dtype or self.weight.dtype
        )

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        """Bytes of the state, whatever the ``length``."""
        channels, width = self.weight.shape
        return batch_size * (width - 1) * channels * self.weight.element_size()

    def flops(self, length: int, batch_size: int = 1) -> int:
        channels, width = self.weight.shape
        return conv_flops(length, channels, width, batch_size)
