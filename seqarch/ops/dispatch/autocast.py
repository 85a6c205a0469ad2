"""Whether ``torch.autocast`` is on, and how to leave it: on devices too that have none, such as ``meta``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_TYPES = {name for name in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(name)}
"""Asked for once: torch 2.11 cannot trace the question."""


def autocast_is_on(device: torch.device) -> bool:
    return device.type in _TYPES and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within the block, products have the dtype of their factors."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()
