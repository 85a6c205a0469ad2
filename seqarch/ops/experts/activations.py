"""The nonlinearities that channel mixers and experts take by name, and the gated unit that is made of one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten
_SLOPE = 1.702


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2`` (So et al. 2021, "Primer", section 3)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2)."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``, GELU by a sigmoid (Hendrycks and Gimpel 2016, section 2)."""
    return x * torch.sigmoid(_SLOPE * x)


def _quick_gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    share = torch.sigmoid(_SLOPE * x)
    return dy * share * (1 + _SLOPE * x * (1 - share))


def bounded(gate: Tensor, value: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Gates up to ``limit``, and values within plus and minus that; as they are where it is 0."""
    return (gate.clamp(max=limit), value.clamp(-limit, limit)) if limit else (gate, value)


def gated_unit(activation: str, gate: Tensor, value: Tensor, limit: float = 0.0, value_offset: float = 0.0) -> Tensor:
    """``act(gate) (value + value_offset)`` of what is :func:`bounded`."""
    gate, value = bounded(gate, value, limit)
    return ACTIVATIONS[activation](gate) * (value + value_offset if value_offset else value)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": squared_relu,
}

DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
    "quick_gelu": _quick_gelu_backward,
    "relu": lambda dy, x: dy * (x > 0),
    "silu": _aten.silu_backward,
    "squared_relu": lambda dy, x: 2 * dy * F.relu(x),
}
"""The gradient of x, from that of the activation's result and x."""
