"""Initial values that several mixers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def step_size_bias(size: int, dt_min: float, dt_max: float, dt_floor: float) -> Tensor:
    """Biases whose softplus is log-uniform in ``[dt_min, dt_max]`` (Gu and Dao 2023, section 3.6; the release's floor).

    Raises:
        ValueError: the bounds are not ``0 < dt_min <= dt_max``.
    """
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"step sizes need 0 < dt_min <= dt_max, got dt_min = {dt_min}, dt_max = {dt_max}")
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.empty(size).uniform_(low, high).exp().clamp(min=dt_floor)
    return dt + torch.log(-torch.expm1(-dt))
