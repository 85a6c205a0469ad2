"""Normalisations that torch does not have: gated, by head, and to unit length."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.ops.dispatch.checks import accumulation_dtype
from seqarch.ops.native import fused
from seqarch.ops.native.token import Program, Value


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` over the last axis, on a CPU by a compiled kernel, with instructions for one token."""

    def forward(self, x: Tensor) -> Tensor:
        if fused.serves(x, self.weight):
            return fused.rms_norm(x, self.weight, fused.Norm(_eps(self, x)))
        return super().forward(x)

    def one_token(self, program: Program, x: Value) -> Value:
        return _one_token(self, program, x)


def _one_token(norm: nn.RMSNorm, program: Program, x: Value) -> Value:
    return program.norm(x, norm.weight, torch.finfo(torch.float32).eps if norm.eps is None else norm.eps)


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


class HeadNorm(nn.RMSNorm):
    """An RMS norm whose weights take the dtype of the input, so that it keeps the projections' dtype under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        if fused.serves(x, self.weight):
            return fused.rms_norm(x, self.weight, fused.Norm(_eps(self, x)))
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)

    def one_token(self, program: Program, x: Value) -> Value:
        return _one_token(self, program, x)


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
