"""Causal convolutions as long as the sequence, by the fast Fourier transform.

A real transform of n numbers is counted as ``2.5 n log2 n`` FLOPs, half of what is usual for a complex one; products
of transforms are elementwise and not counted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import accumulation_dtype


def long_conv(x: Tensor, filters: Tensor, before: Tensor | None = None) -> Tensor:
    """``y_t = sum_s h_s x_{t-s}``, one filter per channel: ``O(D (S + T) log(S + T))``.

    Args:
        x: ``[B, T, D]``.
        filters: h, ``[S + T, D]``.
        before: the inputs before x, ``[B, S, D]``, zeros where a row has fewer; ``None`` for S = 0.

    Returns:
        y ``[B, T, D]``, float32 (float64 for float64 inputs).
    """
    wide, length = accumulation_dtype(x, filters), x.shape[1]
    if before is not None:
        x = torch.cat([before.to(x.dtype), x], dim=1)
    if length == 1:  # a weighted sum, as a product with ones: several times faster here than one product per channel
        products = x.to(wide) * filters.to(wide).flip(0)
        return products.new_ones(1, x.shape[1]) @ products
    total = x.shape[1]
    if not x.shape[0] * length:
        return x[:, total - length :].to(wide) * filters[total - length :]
    # what wraps around must not reach the last T outputs
    size = fft_length(total + length)
    # time last: torch transforms other axes several times slower
    over_time, h = (m.to(wide).mT.contiguous() for m in (x, filters))
    product = torch.fft.rfft(over_time, n=size) * torch.fft.rfft(h, n=size)
    return torch.fft.irfft(product, n=size)[..., total - length : total].mT


def fft_length(least: int) -> int:
    """A length of at least ``least`` whose transform is fast: 1, 3/4 or 5/8 of a power of two."""
    power = 1 << max(0, least - 1).bit_length()
    return next(length for length in (5 * power // 8, 3 * power // 4, power) if length >= least)


def fft_flops(length: int) -> int:
    """FLOPs of one real transform: ``2.5 n log2 n``."""
    return round(2.5 * length * math.log2(length))


def flops(length: int, channels: int, batch_size: int = 1, before: int = 0) -> int:
    """FLOPs of :func:`long_conv` after ``before`` inputs."""
    if length == 1:
        return 2 * batch_size * (before + 1) * channels
    transforms = (2 * batch_size + 1) * channels
    return transforms * fft_flops(fft_length(before + 2 * length)) if length else 0
