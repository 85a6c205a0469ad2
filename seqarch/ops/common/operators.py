"""Custom operators around a pair of kernels: ``torch.compile`` leaves each whole, and autograd knows the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Engine:
    """Two C functions of ``seqarch.h`` or ``seqarch_cuda.h``, and what to know of them.

    Attributes:
        forward, backward: the functions, called in the header's order, but for the number of threads or the stream.
        numbers: the header's number of each dtype.
        offsets: what the functions take for ``cu_seqlens``.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
    numbers: dict[torch.dtype, int]
    offsets: Callable[[Sequence[int] | None, torch.device], Any]


def define(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    outputs: Callable[..., Any],
    gradients: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., tuple[Any, ...]],
    devices: str | Sequence[str] | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operators ``seqarch::NAME``, differentiable, and ``seqarch::NAME_backward``.

    Args:
        forward, backward: what they compute; their annotations are the operators' schemas, and nothing is written to.
        outputs, gradients: tensors of the shapes, dtypes and devices that these return, of the same arguments.
        save, differentiate: the autograd formula, as ``register_autograd`` takes it.
        devices: the types of device that they run on; ``None``: any.
    """
    operator = torch.library.custom_op(f"seqarch::{name}", forward, mutates_args=(), device_types=devices)
    gradient = torch.library.custom_op(f"seqarch::{name}_backward", backward, mutates_args=(), device_types=devices)
    operator.register_fake(outputs)
    gradient.register_fake(gradients)
    operator.register_autograd(differentiate, setup_context=save)
    return operator, gradient
