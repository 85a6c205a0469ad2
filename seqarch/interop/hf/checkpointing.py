"""Layers that are computed again in the backward pass, so that their activations need not be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqarch.models.stack import StackLayer, StackState, in_turn
from seqarch.models.stack_layer import INPUT, run_layer
from seqarch.models.streams import first


@dataclass(frozen=True)
class Recomputed:
    """A schedule of a stack, as :func:`seqarch.models.stack.in_turn`, for which only layers' inputs are kept.

    Attributes:
        checkpoint: as ``torch.utils.checkpoint.checkpoint``.
        every: layer 0 and each so many after it are computed again; the others keep their activations.
    """

    checkpoint: Callable[..., Any]
    every: int = 1

    def __call__(
        self,
        layers: Sequence[StackLayer],
        x: Tensor,
        state: StackState | None,
        cu_seqlens: Any,
        token_mask: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        training = bool(layers) and layers[0].training and torch.is_grad_enabled()
        if not training:
            return in_turn(layers, x, state, cu_seqlens, token_mask, places)
        if state is not None:
            raise ValueError(
                "a state is consumed by the call that is given it, and gradient checkpointing calls twice: expected no"
                " past_key_values, or gradient_checkpointing_disable()"
            )
        after, handed = [], {INPUT: first(x)}
        for i, layer in enumerate(layers):
            arguments = (layer, x, (None,) * len(layer.mixers), cu_seqlens, token_mask, None, handed)
            again = i % self.every == 0
            x, carried, handed = self.checkpoint(run_layer, *arguments) if again else run_layer(*arguments)
            after.append(carried)
        return x, tuple(after)
