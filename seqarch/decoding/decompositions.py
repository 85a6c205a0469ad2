"""Operations of this library that a captured step has as torch's functions, all of which have instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from seqarch.ops.gated_rnn.recurrent_cpp import operator as gated_rnn
from seqarch.ops.native.custom_op import Operator


def _plain(operator: Operator[Any]) -> Callable[..., tuple[Tensor, ...]]:
    """What the operator returns, computed by torch's functions; what it keeps for its gradient is empty."""

    def run(*values: Any) -> tuple[Tensor, ...]:
        inputs = operator.kind(*values)
        return *operator.plain(inputs), *operator.outputs(inputs)[operator.results :]

    return run


DECOMPOSITIONS = {operator.operator._opoverload: _plain(operator) for operator in (gated_rnn,)}
