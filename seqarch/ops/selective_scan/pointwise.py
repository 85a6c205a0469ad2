"""The work per token around the recurrence: the step size before it, skip and gate after it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from seqarch.ops.selective_scan.inputs import SelectiveScanInputs


def step_size(inputs: SelectiveScanInputs) -> Tensor:
    """``Delta [B, T, D]`` in the dtype of sums."""
    dt = inputs.dt.to(inputs.state.dtype)
    if inputs.dt_bias is not None:
        dt = dt + inputs.dt_bias.to(dt.dtype)
    return F.softplus(dt) if inputs.dt_softplus else dt


def scaled_input(inputs: SelectiveScanInputs, delta: Tensor) -> Tensor:
    """The numbers that B writes into the state, ``[B, T, D]`` in delta's dtype: ``delta x``, or x."""
    x = inputs.x.to(delta.dtype)
    return delta * x if inputs.scale_input else x


def skip_and_gate(inputs: SelectiveScanInputs, y: Tensor) -> Tensor:
    """``(y + D x) silu(z)`` in x's dtype, computed in y's."""
    if inputs.D is not None:
        y = y + inputs.D.to(y.dtype) * inputs.x.to(y.dtype)
    if inputs.z is not None:
        y = y * F.silu(inputs.z.to(y.dtype))
    return y.to(inputs.x.dtype)
