"""Queries, keys and values: one projection, an optional short convolution, split into heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn

from seqarch.layers.mixer import LayerConfig, choose_heads
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.short_conv import ShortConvolution


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(LayerConfig):
    """Options of mixers whose heads share the width of the residual stream.

    Attributes:
        num_heads: H; by default heads of width 64 (32 where 64 does not divide D).
    """

    size_options: ClassVar[dict[str, str]] = {"num_heads": "heads"}

    head_options: ClassVar[dict[str, str]] = {"num_heads": "heads"}

    num_heads: int | None = None

    def __post_init__(self):
        super().__post_init__()
        _ = self.heads  # raises where they do not divide the width

    @property
    def heads(self) -> int:
        return choose_heads(self.d_model, self.num_heads)

    @property
    def head_width(self) -> int:
        return self.d_model // self.heads


@dataclass(frozen=True, kw_only=True)
class HeadWidthConfig(HeadsConfig):
    """Options of mixers whose heads may have a width that does not follow from that of the residual stream.

    Attributes:
        head_dim: K = V, so that all heads together have ``H K`` channels; by default ``D / H``.
    """

    size_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "head_dim": "head_width"}

    head_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "head_dim": "keys"}

    head_dim: int | None = None

    @property
    def heads(self) -> int:
        return choose_heads(self.d_model, self.num_heads, self.head_dim)

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.heads

    @property
    def inner(self) -> int:
        """Channels of all heads together."""
        return self.heads * self.head_width


class HeadProjection(nn.Module):
    """``x [B, T, D]`` to one tensor ``[B, T, H, K]`` per part (queries, keys, values), from one matrix.

    Args:
        d_model: D.
        parts: heads and width of each part, as ``((H, K), (H, K), (H, V))``.
        conv_width: width of a depthwise causal convolution over all projected channels; 0 for none.
        activation: ``None`` or ``"silu"``, applied after the convolution (after the projection without one).
        bias: whether the projection has one.
    """

    def __init__(
        self,
        d_model: int,
        parts: Sequence[tuple[int, int]],
        conv_width: int = 0,
        activation: str | None = None,
        bias: bool = False,
    ):
        super().__init__()
        self.parts = tuple(parts)
        self.sizes = [heads * width for heads, width in self.parts]
        self.linear = Linear(d_model, sum(self.sizes), bias=bias)
        self.conv = ShortConvolution(sum(self.sizes), conv_width, activation) if conv_width else None
        self.activation = None if self.conv is not None else activation

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The parts, and the convolution's state (``None`` without one)."""
        x = self.linear(x)
        if self.conv is not None:
            x, state = self.conv(x, state, cu_seqlens)
        elif self.activation == "silu":
            x = nn.functional.silu(x)
        pieces = zip(x.split(self.sizes, dim=-1), self.parts, strict=True)
        return [rearrange(piece, "b t (h k) -> b t h k", h=heads) for piece, (heads, _) in pieces], state

    def head_maps(self, path: str, roles: Sequence[str] = "qkv") -> list[HeadMap]:
        """The parts as a mixer lists them that has this projection under this name, each in its role."""
        starts = accumulate(self.sizes, initial=0)
        parts = zip(roles, self.parts, starts, strict=False)
        return [HeadMap(role, f"{path}.linear", *part, start) for role, part, start in parts]
