"""Blocks of keys or values, compressed to one each."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BlockCompressor(nn.Module):
    """Each block ``x_0 ... x_{l-1}`` of tokens to one: ``W_out silu(W_in [x_i + e_i])``, blocks a stride apart.

    ``e`` is a learnt embedding of the place in the block. All heads share it. Matrices start as ``nn.Linear``'s,
    embeddings normal with standard deviation 0.02.

    Args:
        width: K, of a head.
        length, stride: of the blocks; the stride divides the length.
        hidden: the inner width.
    """

    projections = ("w_in", "w_out")
    fan_in_dims: ClassVar[dict[str, int]] = {"w_in": 1, "w_out": 1}

    def __init__(self, width: int, length: int, stride: int, hidden: int):
        super().__init__()
        self.length, self.stride = length, stride
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        # no nn.Linear: a mixer's costs count those once per token
        self.w_in = _matrix(hidden, length * width)
        self.w_out = _matrix(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, G, K]`` to ``[B, M, G, K]``, M the whole blocks in T tokens."""
        if x.shape[1] < self.length:  # no blocks, of which a gradient of zeros reaches the parameters
            blocks = x[:, :0, :, None].expand(-1, -1, -1, self.length, -1)
        else:
            count, strides = (x.shape[1] - self.length) // self.stride + 1, self.length // self.stride
            pieces = x[:, : (count + strides - 1) * self.stride].unflatten(1, (-1, self.stride))
            blocks = torch.cat([pieces[:, i : i + count] for i in range(strides)], dim=2).transpose(2, 3)
        blocks = blocks + self.place
        return F.linear(F.silu(F.linear(blocks.flatten(-2), self.w_in)), self.w_out)

    def flops(self, blocks: int) -> int:
        """FLOPs of so many compressed blocks, counted over rows and heads."""
        return 2 * blocks * (self.w_in.numel() + self.w_out.numel())


def _matrix(fan_out: int, fan_in: int) -> nn.Parameter:
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(fan_out, fan_in).uniform_(-bound, bound))
