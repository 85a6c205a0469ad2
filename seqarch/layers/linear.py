"""The linear maps of mixers and models."""

from __future__ import annotations

from torch import Tensor, nn

from seqarch.ops.common import linear_cpp, linear_onednn
from seqarch.ops.common.token_cpp import Program, Value


class Linear(nn.Linear):
    """``nn.Linear``; on a CPU by what is faster there than torch's own choice, where there is such a thing.

    A few rows without gradients: a kernel that reads the weights faster, :mod:`seqarch.ops.common.linear_cpp`. Many
    rows in float32: another library that torch ships, :mod:`seqarch.ops.common.linear_onednn`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if linear_cpp.serves(x, self.weight, self.bias):
            return linear_cpp.linear(x, self.weight, self.bias)
        if linear_onednn.serves(x, self.weight):
            return linear_onednn.linear(x, self.weight, self.bias)
        return super().forward(x)

    def one_token(self, program: Program, x: Value, add_to: Value | None = None) -> Value:
        return program.linear(x, self.weight, self.bias, add_to)
