"""What the compiled and the Triton kernels share: their inputs, and the outputs that they write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqarch.ops.gated_rnn.inputs import GatedRnnInputs
from seqarch.ops.native.huge_pages import in_huge_pages, like

CELLS = {"slstm": 0, "lstm": 1, "gru": 2}
"""The number of each cell in the C header and in the Triton kernels."""


@dataclass(frozen=True)
class KernelInputs(GatedRnnInputs):
    """The inputs as the kernels take them.

    Attributes:
        keep: whether the states of every step are kept for the backward pass.
    """

    keep: bool


def with_keep(inputs: GatedRnnInputs) -> KernelInputs:
    """The inputs, and whether a backward pass may follow."""
    given: tuple[Any, ...] = inputs.values()
    keep = torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in given)
    return KernelInputs(*given, keep=keep)


def empty_outputs(inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
    """h, the last state, and the states of every step where they are kept, uninitialised."""
    x, state = inputs.x, inputs.state
    steps = state.new_empty(x.shape[0] if inputs.keep else 0, x.shape[1], *state.shape[1:])
    return x.new_empty(*x.shape[:3], x.shape[4]), like(state), in_huge_pages(steps)
