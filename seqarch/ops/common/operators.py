"""Custom operators around a pair of kernels: ``torch.compile`` leaves each whole, and autograd knows the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


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
