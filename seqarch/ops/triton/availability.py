"""Whether the Triton backends can run, and which calls they do not support: asked before any of them loads Triton.

``TRITON_INTERPRET=1`` runs the kernels on a CPU by Triton's interpreter, slowly: for tests. It must be set before the
first call.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from seqarch.ops.dispatch.checks import promoted_dtype

WIDEST = 256
"""The greatest key and value width that the kernels take."""

_interpret = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_missing = None if importlib.util.find_spec("triton") else "the package triton is not installed"


def interpreting() -> bool:
    """Whether kernels run by Triton's interpreter."""
    return _interpret


@contextmanager
def interpreted() -> Iterator[None]:
    """Within the block, kernels run by Triton's interpreter, as if ``TRITON_INTERPRET=1`` had been set from the start.

    Raises:
        RuntimeError: the kernels are loaded already, to be compiled.
    """
    global _interpret
    before = _interpret, os.environ.get("TRITON_INTERPRET")
    if _compiled():
        raise RuntimeError("the Triton kernels are loaded already: set TRITON_INTERPRET=1 before the first call")
    os.environ["TRITON_INTERPRET"], _interpret = "1", True
    try:
        yield
    finally:
        _interpret = before[0]
        os.environ.pop("TRITON_INTERPRET")
        os.environ.update({} if before[1] is None else {"TRITON_INTERPRET": before[1]})


def _compiled() -> bool:
    """Whether kernels were loaded to be compiled, which cannot be taken back."""
    tiles = sys.modules.get("seqarch.ops.triton.tiles")
    return tiles is not None and type(tiles.tile).__name__ == "JITFunction"


def unavailable() -> str | None:
    """Why no Triton kernel can run on this machine, or ``None`` if they can."""
    if _missing is not None or _interpret:
        return _missing
    return None if torch.cuda.is_available() else "there is no CUDA device (TRITON_INTERPRET=1 runs it on a CPU)"


def unsupported_recurrence(q: Tensor, v: Tensor, state: Tensor) -> str | None:
    """Why the kernels of a matrix-state recurrence cannot serve a call with these arguments."""
    return unsupported("q", q, state.dtype, K=q.shape[3], V=v.shape[3])


def unsupported_attention(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels of softmax attention cannot serve a call with these arguments."""
    return unsupported("q", q, promoted_dtype(q, k, v), K=q.shape[3], V=v.shape[3])


def unsupported(name: str, x: Tensor, widest: torch.dtype, **widths: int) -> str | None:
    """Why kernels cannot serve a call: the device, the widest dtype of inputs, or widths beyond :data:`WIDEST`."""
    if not _interpret and x.device.type != "cuda":
        return f"{name} is on {x.device}, expected cuda"
    if not _interpret and widest == torch.float64:
        return "an input is float64, expected float32, bfloat16 or float16"
    for letter, width in widths.items():
        if width > WIDEST:
            return f"{letter} is {width}, expected at most {WIDEST}"
    return None
