"""Stacks whose tokens are compiled, and the same in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqarch import ops
from seqarch.layers import MIXERS
from seqarch.models import Stack, StackConfig
from seqarch.ops.native import tape


@dataclass
class Runs:
    """How many programs ran."""

    count: int = 0


NOT_CAPTURED = ("hyena", "nsa", "path_attention")
CAPTURED = tuple(name for name in MIXERS if name not in NOT_CAPTURED)
"""A step of ``hyena`` compares filters by their values; ``nsa`` pads by a length, which torch does not capture; one of
``path_attention`` writes all of its keys anew."""


PARTLY_CAPTURED = (
    *("big_bird", "moba", "stick_breaking_attention"),
    *("log_linear_gated_delta_net", "log_linear_mamba2"),
)
"""Those of which torch does a part: attention over listed blocks and over sticks, and states of levels."""

COMPILED = tape.unavailable() or "compiled"
"""What a layer says of a token that is all compiled: without the compiled library, why it is not."""


def make(pattern: str = "mamba", depth: int = 2, width: int = 96, **options: object) -> Stack:
    torch.manual_seed(0)
    stack = Stack(StackConfig(d_model=width, pattern=pattern, depth=depth, **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return stack


def in_torch(stack: Stack, x: Tensor, state: object) -> tuple[Tensor, object]:
    with ops.record_backends():  # whoever looks at operations sees them
        return stack(x, state)
