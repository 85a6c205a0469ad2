"""The linear maps of mixers and models."""

from __future__ import annotations

from torch import Tensor, nn

from seqarch.ops.common import linear_cpp
from seqarch.ops.common.token_cpp import Program, Value


class Linear(nn.Linear):
    """``nn.Linear``; on a CPU without gradients, a few rows at a time, by a kernel that reads the weights faster.

    One decoded token takes about as long as reading the weights: see :mod:`seqarch.ops.common.linear_cpp`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if linear_cpp.serves(x, self.weight, self.bias):
            return linear_cpp.linear(x, self.weight, self.bias)
        return super().forward(x)

    def one_token(self, program: Program, x: Value, add_to: Value | None = None) -> Value:
        return program.linear(x, self.weight, self.bias, add_to)
