"""Normalisations: those of a residual stream, gated ones, by head, and to unit length."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.ops.dispatch.checks import accumulation_dtype, unknown_name
from seqarch.ops.native import fused

NORMS: dict[str, str] = {
    "rms": "divides by the root of the mean square, times weights (Zhang and Sennrich 2019)",
    "rms_without_weights": "the same without weights",
    "layer": "subtracts the mean, divides by the standard deviation, times weights, plus a bias (Ba et al. 2016)",
    "layer_without_bias": "the same without bias (Cohere)",
    "layer_without_weights": "the same without either (OLMo)",
}
"""Norms of a residual stream, over its last axis."""


Weights = Literal["ones", "zeros", "none"]
"""What a norm multiplies by: weights, 1 at first; or ``1 + weight``, 0 at first (Gemma); or nothing."""


def weights_of(zero_centred: bool) -> Weights:
    """Those of a norm that has weights."""
    return "zeros" if zero_centred else "ones"


class _WeightedNorm(nn.RMSNorm):
    """``nn.RMSNorm`` over the last axis.

    Args:
        width: size of the last axis.
        eps: added to the mean square; by default the spacing of numbers at 1 in the dtype of the input.
        weights: one of :data:`Weights`.
    """

    def __init__(self, width: int, eps: float | None = None, weights: Weights = "ones"):
        self.zero_centred = weights == "zeros"
        super().__init__(width, eps, elementwise_affine=weights != "none")

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero_centred:
            nn.init.zeros_(self.weight)

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """The norm of ``x [..., width]``, of which ``1 + weight`` is computed in float32 at least."""
        if self.zero_centred:
            weight = 1 + self.weight.to(accumulation_dtype(x))
        if fused.serves(x, weight):
            return fused.rms_norm(x, weight, fused.Norm(_eps(self, x)))
        if self.zero_centred and weight is not None:
            return F.rms_norm(x.to(weight.dtype), self.normalized_shape, weight, _eps(self, x)).to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class RMSNorm(_WeightedNorm):
    """``nn.RMSNorm`` over the last axis, on a CPU by a compiled kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return self._normed(x, self.weight)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last axis, with one of :data:`Weights`, and without them without a bias too."""

    def __init__(self, width: int, eps: float = 1e-5, weights: Weights = "ones", bias: bool = True):
        self.zero_centred = weights == "zeros"
        super().__init__(width, eps, elementwise_affine=weights != "none", bias=bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero_centred:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self.zero_centred:
            return super().forward(x)
        weight = 1 + self.weight.to(accumulation_dtype(x))
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return F.layer_norm(x.to(weight.dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def check_norm(option: str, kind: str, *others: str) -> None:
    """Raise unless an option names one of :data:`NORMS`, or of the others.

    Raises:
        ValueError: it does not.
    """
    if kind not in NORMS and kind not in others:
        raise unknown_name(option, kind, (*NORMS, *others))


def build_norm(kind: str, width: int, eps: float, zero_centred: bool = False) -> nn.Module:
    """A norm of ``[..., width]``, one of :data:`NORMS`.

    Args:
        eps: added to the mean square or the variance.
        zero_centred: multiplies by ``1 + weight``, with weights of 0 at first, where it has weights.

    Raises:
        ValueError: there is no such norm.
    """
    check_norm("norm", kind)
    weights = "none" if kind.endswith("_without_weights") else weights_of(zero_centred)
    if kind.startswith("rms"):
        return RMSNorm(width, eps, weights)
    return LayerNorm(width, eps, weights, bias=not kind.endswith("_without_bias"))


def _eps(norm: nn.RMSNorm, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps


class GatedRMSNorm(nn.Module):
    """RMS norm over the last axis with a gate of the same shape.

    Args:
        width: size of the last axis.
        gate: ``"before"``: ``norm(x silu(z))`` (Mamba-2); ``"after"``: ``norm(x) silu(z)`` (Gated DeltaNet).
        groups: normalise the last axis in this many equal parts.
        eps: added to the mean square.
        activation: of the gate: ``"silu"``, or ``"sigmoid"`` (Kimi delta attention).
    """

    def __init__(
        self,
        width: int,
        gate: Literal["before", "after"],
        groups: int = 1,
        eps: float = 1e-5,
        activation: Literal["silu", "sigmoid"] = "silu",
    ):
        super().__init__()
        if width % groups:
            raise ValueError(f"a norm of width {width} cannot be cut into {groups} groups")
        self.gate, self.groups, self.eps = gate, groups, eps
        self.norm = fused.Norm(eps, activation, gate == "before", groups)
        self.activation = F.silu if activation == "silu" else torch.sigmoid
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if fused.serves(x, z, self.weight):
            return fused.rms_norm(x, self.weight, self.norm, z)
        if self.gate == "before":
            x = x * self.activation(z)
        parts = x.unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight.to(x.dtype)
        return normed if self.gate == "before" else normed * self.activation(z)


class HeadNorm(_WeightedNorm):
    """An RMS norm whose weights take the dtype of the input, so that it keeps the projections' dtype under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return self._normed(x, self.weight if self.zero_centred or self.weight is None else self.weight.to(x.dtype))


class AllHeadsNorm(HeadNorm):
    """A :class:`HeadNorm` over the channels of all heads together, of ``x [B, T, H, K]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Unit norm along the last axis: ``x / sqrt(|x|^2 + eps)``, as in the release of DeltaNet; 0 stays 0.

    In float32 at least: a norm rounded to bfloat16 may exceed 1 by 0.4%, and with beta near 2 the state then grows.
    """
    if fused.serves(x):
        return fused.rms_norm(x, None, fused.Norm(eps / x.shape[-1], factor=x.shape[-1] ** -0.5))
    wide = x.to(accumulation_dtype(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
