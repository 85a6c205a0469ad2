"""The nonlinearities that channel mixers and experts take by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2`` (So et al. 2021, "Primer", section 3)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": squared_relu,
}

DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
    "relu": lambda dy, x: dy * (x > 0),
    "silu": _aten.silu_backward,
    "squared_relu": lambda dy, x: 2 * dy * F.relu(x),
}
"""The gradient of x, from that of the activation's result and x."""
