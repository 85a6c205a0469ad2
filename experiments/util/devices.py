"""The devices that a run may name."""

from __future__ import annotations

from experiments.util.errors import RunnerError


def require_device(name: str) -> None:
    """Raise ``RunnerError`` unless this machine has a device of that name: ``cpu``, ``cuda`` or ``auto``."""
    import torch  # Takes seconds, which a wrong key need not wait for.

    if name == "cuda" and not torch.cuda.is_available():
        raise RunnerError("train.device is 'cuda', but torch sees no CUDA device here; choose 'cpu' or 'auto'")
