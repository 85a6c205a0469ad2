"""Several residual streams: how a branch reads them, how they mix, and how it is added to them.

A residual stream becomes n streams ``X [B, T, n, D]``, at first alike. A branch f, which is a layer's mixers or its
channel mixer, has a connection that makes of them, token by token, weights of three kinds: f reads ``u = sum_i a_i
X_i``, and ``X'_j = sum_i A_ij X_i + b_j f(u)`` are the streams after it. Nothing is carried from token to token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import RMSNorm
from seqarch.ops.dispatch.checks import accumulation_dtype

EPS = 1e-6
"""Added to the weights of :class:`ManifoldHyperConnection` and to the sums that they are divided by."""

Streams = tuple[Tensor, Tensor]
"""The mixed streams ``[B, T, n, D]``, and the weights ``[B, T, n]`` with which a branch is added to them."""


class HyperConnection(nn.Module):
    """Hyper-connections: each weight is learnt, plus ``s tanh(w . norm(X_i))`` with s of 0.01 and w of 0 at first.

    Zhu et al. 2024, "Hyper-Connections", equations 9 to 13 and appendix J, the dynamic ones. At first the branch reads
    one stream, by turns over the depth, the streams do not mix and each gets the branch's output.

    Args:
        width: D.
        streams: n.
        number: of the branch in its stack, which says what stream it reads at first.
    """

    unquantized = ("dynamic",)

    no_weight_decay = ("mixing",)

    def __init__(self, width: int, streams: int, eps: float, number: int, sinkhorn_steps: int = 0):
        super().__init__()
        self.width, self.streams = width, streams
        reads = F.one_hot(torch.tensor(number % streams), streams).unsqueeze(-1)
        self.mixing = nn.Parameter(torch.cat([reads.float(), torch.eye(streams)], dim=1))  # [n, 1 + n]: a, then A
        self.writing = nn.Parameter(torch.ones(streams))
        self.norm = nn.LayerNorm(width, eps)
        self.dynamic = Linear(width, streams + 2, bias=False)  # to a stream's a, A and b
        nn.init.zeros_(self.dynamic.weight)
        self.scales = nn.Parameter(torch.full((2,), 0.01))  # of a and A, and of b

    def forward(self, x: Tensor) -> tuple[Tensor, Streams]:
        """Of ``x [B, T, n, D]`` what the branch reads, ``[B, T, D]``, and what it is added to."""
        moved = torch.tanh(self.dynamic(self.norm(x)))
        mixing = self.mixing + self.scales[0] * moved[..., :-1]
        writing = self.writing + self.scales[1] * moved[..., -1]
        mixed = mixing.to(x.dtype).transpose(-1, -2) @ x
        return mixed[..., 0, :], (mixed[..., 1:, :], writing.to(x.dtype))

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.streams * self.width * (2 * self.streams + 3)


class ManifoldHyperConnection(nn.Module):
    """Hyper-connections whose streams mix by a matrix with rows and columns that sum to 1, so that none grows.

    One map W of all streams, in an RMS norm without weights, with a scale and a bias for each kind: ``a = sigmoid(.)``,
    ``b = 2 sigmoid(.)``, A a softmax over its rows, divided by the sums of its columns and rows by turns (Sinkhorn and
    Knopp 1967). Xie et al. 2025, "mHC: Manifold-Constrained Hyper-Connections"; computed in float32 at least. W is
    normal with 0.02 at first, biases are 0 and scales 1, as in DeepSeek-V4's code.

    Args:
        number: of the branch in its stack; not used here.
    """

    unquantized = ("dynamic",)

    def __init__(self, width: int, streams: int, eps: float, number: int, sinkhorn_steps: int = 20):
        super().__init__()
        self.width, self.streams, self.steps = width, streams, sinkhorn_steps
        self.norm = RMSNorm(streams * width, eps, weights="none")
        self.dynamic = Linear(streams * width, (2 + streams) * streams)
        nn.init.normal_(self.dynamic.weight, std=0.02)
        nn.init.zeros_(self.dynamic.bias)
        self.scales = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Streams]:
        """As :meth:`HyperConnection.forward`."""
        n, wide = self.streams, accumulation_dtype(x)
        weights = F.linear(self.norm(x.flatten(2).to(wide)), self.dynamic.weight.to(wide))
        sizes = [n, n, n * n]
        kinds = zip(
            weights.split(sizes, -1), self.dynamic.bias.to(wide).split(sizes), self.scales.unbind(), strict=True
        )
        reads, writes, mixes = (scale.to(wide) * weight + bias for weight, bias, scale in kinds)
        mixing = torch.softmax(mixes.unflatten(-1, (n, n)), -1) + EPS
        for step in range(2 * self.steps - 1):  # columns first and last
            mixing = mixing / (mixing.sum(-1 if step % 2 else -2, keepdim=True) + EPS)
        read = ((torch.sigmoid(reads) + EPS).unsqueeze(-1) * x).sum(-2).to(x.dtype)
        return read, (mixing.to(x.dtype).transpose(-1, -2) @ x, (2 * torch.sigmoid(writes)).to(x.dtype))

    def flops(self, tokens: int) -> int:
        n = self.streams
        return 2 * tokens * n * self.width * ((2 + n) * n + n)


class WeightedStreams(nn.Module):
    """One stream of several: their sum with weights ``sigmoid(s W norm(X) + c)``, as at DeepSeek-V4's head."""

    unquantized = ("dynamic",)

    def __init__(self, width: int, streams: int, eps: float):
        super().__init__()
        self.width, self.streams = width, streams
        self.norm = RMSNorm(streams * width, eps, weights="none")
        self.dynamic = Linear(streams * width, streams)
        nn.init.normal_(self.dynamic.weight, std=0.02)
        nn.init.zeros_(self.dynamic.bias)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        wide = accumulation_dtype(x)
        weights = F.linear(self.norm(x.flatten(2).to(wide)), self.dynamic.weight.to(wide))
        weights = torch.sigmoid(self.scale.to(wide) * weights + self.dynamic.bias.to(wide)) + EPS
        return (weights.unsqueeze(-1) * x).sum(-2).to(x.dtype)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.streams**2 * self.width


CONNECTIONS = {"hyper_connections": HyperConnection, "manifold": ManifoldHyperConnection}
OUTPUTS = ("sum", "mean", "weighted")
"""How the streams become one after the last layer."""


def split(x: Tensor, streams: int) -> Tensor:
    """``[B, T, D]`` as so many streams alike, ``[B, T, n, D]``; as it is where there is one."""
    return x if streams == 1 else x.unsqueeze(2).expand(-1, -1, streams, -1)


def first(x: Tensor) -> Tensor:
    """What was split, where it was."""
    return x if x.ndim == 3 else x[:, :, 0]


def added(streams: Streams, branches: Sequence[Tensor]) -> Tensor:
    """The streams ``[B, T, n, D]`` after branches ``[B, T, D]`` were added."""
    mixed, weights = streams
    for y in branches:
        mixed = mixed + weights.unsqueeze(-1).to(y.dtype) * y.unsqueeze(-2)
    return mixed
