"""The backends of an operation that run here."""

from __future__ import annotations

import torch

from seqarch.ops import OPS

ON_A_GPU = ("_triton", "_mm", "_cuda", "_mamba_ssm", "parallel_causal_conv1d", "_flash_attn")
"""How the names of backends end that take tensors of a GPU."""


def available(op: str) -> list[str]:
    """The backends of an operation whose packages are here and that run on a CPU, where these tests' tensors are."""
    here = [name for name, backend in OPS[op].backends.items() if backend.unavailable() is None]
    return [name for name in here if not name.endswith(ON_A_GPU)]


def on_device(op: str) -> list[str]:
    """The backends of an operation whose kernels run on a CUDA device, and that run here."""
    here = [name for name, backend in OPS[op].backends.items() if backend.unavailable() is None]
    return [name for name in here if name.endswith(("_triton", "_cuda"))] if torch.cuda.is_available() else []
