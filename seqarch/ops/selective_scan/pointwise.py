"""What stands around the recurrence, token by token: the step size before it, skip and gate after it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    """``Delta [B, T, D]`` in ``dtype``."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def written(x: Tensor, delta: Tensor, scale_input: bool) -> Tensor:
    """What B writes into the state, ``[B, T, D]`` in delta's dtype: ``delta x``, or x."""
    return delta * x.to(delta.dtype) if scale_input else x.to(delta.dtype)


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """``(y + D x) silu(z)`` in x's dtype, computed in y's."""
    if D is not None:
        y = y + D.to(y.dtype) * x.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)
