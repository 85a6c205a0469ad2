"""What torch does among the instructions of a tape, and what it sees of the tape's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from seqarch.ops.native.view import Amount, View


@dataclass(frozen=True)
class Called:
    """The value of a node that torch computes among the instructions: it is known while they run."""

    node: fx.Node


@dataclass(frozen=True)
class Seen:
    """Numbers of the tape that torch sees as a tensor, in place unless they are truths."""

    view: View
    dtype: torch.dtype


@dataclass(frozen=True)
class Changing:
    """A whole number that follows from sizes of the state: torch sees what it is at this token."""

    amount: Amount


@dataclass(frozen=True)
class Call:
    """A node that torch runs after ``after`` instructions of the tape; its arguments may be the three above."""

    after: int
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reason: str
