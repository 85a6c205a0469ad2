"""float32 products by oneDNN, which torch ships and does not use for them, where that is the faster library.

torch gives float32 products of matrices to MKL. On processors that are not Intel's, MKL keeps to AVX2 even where
AVX-512 is there, and oneDNN is twice as fast (docs/log.md), at the same precision. It is reached through the operator
that torch's own compiler uses for linear maps.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.dispatch.eager import active_transform, has_dispatch_mode, is_eager

LEAST_ROWS = 8
"""Fewer take as long as reading the weights, which oneDNN would bring into another order first."""

PROCESSOR = Path("/proc/cpuinfo")


@cache
def unavailable() -> str | None:
    """Why oneDNN's products cannot run here, or would be no faster; ``None`` where they are."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "torch was built without oneDNN"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "torch finds no AVX-512 here, and with AVX2 MKL is as fast"
    return None if PROCESSOR.exists() and "GenuineIntel" not in PROCESSOR.read_text()[:512] else "MKL uses AVX-512 here"


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes ``x weight^T``, and faster than torch: float32, at least 8 rows, nobody looking on."""
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and x.numel() >= LEAST_ROWS * x.shape[-1] > 0
        and weight.numel() > 0
        and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
        and is_eager(x.device)
        and not has_dispatch_mode()
        and unavailable() is None
    )


def _dense(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows or its columns have no gaps, else a copy: gaps cost oneDNN its fast kernels."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), None, "none", [], "")


def rounded(count: int) -> int:
    """The next of eight numbers from one power of two to the next, of sixteen from 256 on."""
    step = 1 << max(0, (count - 1).bit_length() - (4 if count <= 256 else 5))
    return -(-count // step) * step


def _padded(x: Tensor) -> Tensor:
    """Rows of zeros after those of ``x``, up to a rounded number."""
    count, most = len(x), rounded(len(x))
    if count == most:
        return x
    padded = x.new_empty(most, x.shape[1])
    padded[:count], padded[count:] = x, 0
    return padded


def fastest_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``, for where no gradients are recorded: by oneDNN where that serves, else by torch.

    Of the matrix ``a`` the dimension whose numbers lie furthest apart may be of any size at each call, as tokens of an
    expert are. oneDNN writes code for each size, 0.6 MB and some milliseconds, and keeps the last 1024: it gets a few
    sizes, with rows or summands of zeros.
    """
    if not serves(a, b):
        return a @ b.t()
    a = _dense(a)
    if a.is_contiguous():
        return _product(_padded(a), b).resize_(len(a), len(b))
    return _product(_padded(a.t()).t(), _padded(b.t()).t())


class _Product(torch.autograd.Function):
    """``a b^T`` of ``a [M, K]`` and ``b [N, K]``, of any strides; its gradients are such products again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _product(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        return product(gradient, b.t()) if of_a else None, _of_weight(gradient, a) if of_b else None


def _of_weight(gradient: Tensor, a: Tensor) -> Tensor:
    """``gradient^T a``: oneDNN copies the left factor of a product where it is transposed, so the narrower is on the
    left."""
    if gradient.shape[1] > a.shape[1]:
        return product(a.t(), gradient.t()).t().contiguous()
    return product(gradient.t(), a.t())


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``: ``[M, K]`` and ``[N, K]`` to ``[M, N]``, none of the sizes 0."""
    if active_transform() is not None:  # a backward pass is batched, or transformed
        return a @ b.t()
    return _Product.apply(a, b)  # type: ignore[return-value]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias``: ``x [..., K]``, ``weight [N, K]``, ``bias [N]`` to ``[..., N]``."""
    y = product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias
