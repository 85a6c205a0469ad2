"""Tensors whose neighbours in memory are NaN, for kernels that read beyond them."""

from __future__ import annotations

import torch
from torch import Tensor


def surrounded(x: Tensor) -> Tensor:
    """The same numbers, with NaN before and after each token's and around all of them."""
    batch, length, *rest = x.shape
    width = torch.Size(rest).numel()
    memory = x.new_full((batch * length + 128, width + 80), torch.nan)
    memory[64 : 64 + batch * length, 40 : 40 + width] = x.reshape(batch * length, width)
    return memory[64 : 64 + batch * length, 40 : 40 + width].view(x.shape)
