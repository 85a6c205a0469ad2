"""Parts of the backends that call vendors' packages. They are never chosen by ``"auto"``, only by name."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

DEVICE = "cuda"
"""The type of device that the packages run on; tests, which put stand-ins in their place, name another."""

NARROW = torch.bfloat16, torch.float16
FLOATS = torch.float32, *NARROW


def unavailable(package: str) -> str | None:
    """Why no kernel of this package can run on this machine, or ``None`` if they can."""
    if importlib.util.find_spec(package) is None:
        return f"the package {package.replace('_', '-')} is not installed"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def unsupported(dtypes: tuple[torch.dtype, ...], **inputs: Tensor | None) -> str | None:
    """Why kernels that take one of these dtypes, the same for all inputs, cannot serve these."""
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    first, lead = next(iter(given.items()))
    if lead.device.type != DEVICE:
        return f"{first} is on {lead.device}, expected {DEVICE}"
    if lead.dtype not in dtypes:
        return f"{first} has dtype {lead.dtype}, expected one of {', '.join(map(str, dtypes))}"
    for name, tensor in given.items():
        if tensor.dtype != lead.dtype:
            return f"{name} has dtype {tensor.dtype}, expected {lead.dtype} as {first}"
    if not lead.shape[1]:
        return "there are no tokens"
    return None
