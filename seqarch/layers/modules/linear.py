"""The linear maps of mixers and models."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from seqarch.ops.dispatch.eager import is_untouched
from seqarch.ops.native import linear, onednn

PLAIN = (nn.Parameter, Tensor)
"""Types of weights that are their numbers; a subclass, as quantisers make, says itself how it is multiplied."""


class Linear(nn.Linear):
    """``nn.Linear``; on a CPU by what is faster there than torch's own choice, where there is such a thing.

    A few rows without gradients: a kernel that reads the weights faster, :mod:`seqarch.ops.native.linear`. Many
    rows in float32: another library that torch ships, :mod:`seqarch.ops.native.onednn`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias`` by what is fastest."""
    if type(weight) in PLAIN:
        if linear.serves(x, weight, bias):
            return linear.linear(x, weight, bias)
        if onednn.serves(x, weight):
            return onednn.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map and nothing more, so that its ``weight`` may be read where it would be called.

    An adapter, a quantised weight, hooks and a ``forward`` of its own are more: such a module must be called.
    """
    return type(module) in (Linear, nn.Linear) and is_untouched(module) and type(module.weight) in PLAIN


def widened(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` computed in the dtype of x: with all its floating-point tensors in that, whatever it is made of."""
    named = chain(module.named_parameters(), module.named_buffers())
    others = {name: m.to(x.dtype) for name, m in named if m.is_floating_point() and m.dtype != x.dtype}
    return functional_call(module, others, (x,)) if others else module(x)


def hold_the_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; what holds none does not differ."""
    if a is b or a.is_meta or b.is_meta or a.shape != b.shape:
        return True
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
