"""RWKV's token shift, and its low-rank maps of a mixture of a token and the one before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.short_conv import ShortConvolution

DEPTH = 0.5
"""Where in the depth the initial values are those of the release, whose layers know which they are."""


class TokenShift(ShortConvolution):
    """The token before each, as a short convolution of width 2 with the fixed weights 1 and 0: it has no tensors."""

    def __init__(self, channels: int):
        super().__init__(channels, 2)
        del self.weight

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        weight = F.pad(x.new_ones(self.channels, 1), (0, 1))
        return ops.causal_conv1d(x, weight, state=state, cu_seqlens=cu_seqlens)


def low_rank(
    size: int, rank: int, between: nn.Module, bias: Tensor | None = None, outputs: int | None = None
) -> nn.Sequential:
    """A map of ``size`` channels to ``outputs``, by default as many, by way of ``rank``.

    Orthogonal at first on its way out, as in the release.
    """
    outputs = outputs or size
    outer = Linear(rank, outputs, bias=bias is not None)
    nn.init.orthogonal_(outer.weight, gain=0.1 * max(1.0, rank / outputs) ** 0.5)
    if bias is not None:
        outer.bias = nn.Parameter(bias.clone())  # several maps may start alike, and are trained apart
    return nn.Sequential(Linear(size, rank, bias=False), between, outer)
