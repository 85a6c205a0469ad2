"""Operations of this library that a captured step has as torch's functions, all of which have instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import seqarch.ops  # noqa: F401  (defines the operators)
from seqarch.ops.native.custom_op import OPERATORS, Operator


def _plain(operator: Operator[Any]) -> Callable[..., tuple[Tensor, ...]]:
    """What the operator returns, computed by torch's functions; what it keeps for its gradient is empty."""

    def run(*values: Any) -> tuple[Tensor, ...]:
        inputs = operator.kind(*values)
        return *operator.plain(inputs), *operator.outputs(inputs)[operator.results :]

    return run


DECOMPOSITIONS = {each.operator._opoverload: _plain(each) for each in (OPERATORS["gated_rnn"],)}
