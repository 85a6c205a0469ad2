"""Griffin's recurrent block: a gate beside a short convolution and a real-gated linear recurrent unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.mixer import Boundaries, Device, LayerConfig
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.positions import token_positions
from seqarch.layers.modules.short_conv import ShortConvolution
from seqarch.layers.recurrent.base import ElementwiseMixer, elementwise_scan

SHARPNESS = 8.0
"""c of the paper: how much faster than ``sigmoid(-Lambda)`` the fastest decay is."""

SMALLEST = 2.5e-7
"""``1 - a^2`` below which the derivative of its root is held, at 1000, as in the release."""


@dataclass(frozen=True, kw_only=True)
class RgLruConfig(LayerConfig):
    """Options of :class:`RgLru`.

    Attributes:
        lru_width: E, the width of the recurrence; by default D (the paper's models have about 4 D / 3).
        num_heads: blocks of the gates' block-diagonal matrices; by default of width 64 where that divides E, else
            of the least width from 32 to 128 that does.
        conv_width: width of the short convolution.
        scale_first: whether the first token of a sequence is scaled by ``sqrt(1 - a^2)`` like all others, as in the
            paper; in the release, and here by default, it is not.
        negative_eigenvalues: moves the decay to ``2 a - 1`` in (-1, 1), which lets the model track state
            (Grazzi et al. 2024).
    """

    size_options: ClassVar[dict[str, str]] = {"lru_width": "width"}

    lru_width: int | None = None
    num_heads: int | None = None
    conv_width: int = 4
    scale_first: bool = False
    negative_eigenvalues: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"num_heads ({self.num_heads}) must divide the inner width ({self.width})")

    @property
    def width(self) -> int:
        return self.lru_width or self.d_model

    @property
    def heads(self) -> int:
        if self.num_heads is not None:
            return self.num_heads
        blocks = (64, *range(min(32, self.width), 129))
        block = next((block for block in blocks if self.width % block == 0), None)
        if block is None:
            raise ValueError(
                f"lru_width ({self.width}) has no divisor from 32 to 128: give num_heads, which divides it"
            )
        return self.width // block


class RgLruState(NamedTuple):
    """State of :class:`RgLru`.

    Attributes:
        conv: the short convolution's last inputs ``[B, W - 1, E]``.
        recurrent: ``[B, E, 1]``, float32 (float64 in float64 modules).
        seen: ``[B]``, how many tokens each row has seen: the first is treated otherwise.
    """

    conv: Tensor | None
    recurrent: Tensor
    seen: Tensor


class RgLru(ElementwiseMixer):
    """``h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t``, ``a_t = exp(-8 r_t softplus(Lambda))``; u a short convolution.

    The gates r and i are sigmoids of block-diagonal maps of u, the output is ``W_o (h gelu(W_y x))``. De et al. 2024,
    "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models", sections 2.3 and 2.4.
    Not the complex LRU, whose decay is fixed, nor HGRN, which ties what it writes to what it forgets by ``1 - a``.
    The first token is not scaled, unlike the paper's equation and as in the release (``scale_first``). Lambda is drawn
    so that ``a`` at r = 1 is uniform in (0.9, 0.999), as the paper says; the release draws its 8th root from there.
    Gates start with variance ``heads / E`` and biases of 0, other projections with ``nn.Linear``'s initialisation.
    """

    Config = RgLruConfig

    @from_options
    def __init__(self, config: RgLruConfig):
        super().__init__(config)
        width = config.width
        self.gate = Linear(config.d_model, width)
        self.in_proj = Linear(config.d_model, width)
        self.conv = ShortConvolution(width, config.conv_width, bias=True)
        self.write_gate = BlockLinear(width, config.heads)
        self.decay_gate = BlockLinear(width, config.heads)
        decay = torch.empty(width).uniform_(0.9, 0.999)
        self.Lambda = nn.Parameter(torch.expm1(-decay.log() / SHARPNESS).log())
        self.out_proj = Linear(width, config.d_model)
        self.state_shape = (width, 1)

    def mix(self, x: Tensor, state: RgLruState, cu_seqlens: Boundaries) -> tuple[Tensor, RgLruState]:
        # branch of the recurrence: projection and short convolution, [B, T, E]
        positions, seen = token_positions(state.seen, x.shape[1], cu_seqlens)
        u, conv = self.conv(self.in_proj(x), state.conv, cu_seqlens)
        # gates from u; what is written is scaled by sqrt(1 - a^2), which keeps the variance of h
        wide, signed = self.state_dtype, self.config.negative_eigenvalues
        rate = SHARPNESS * F.softplus(self.Lambda.to(wide))
        log_decay = -rate * torch.sigmoid(self.decay_gate(u).to(wide))
        scale = complement(log_decay, signed)
        if not self.config.scale_first:
            scale = torch.where(positions.unsqueeze(-1) == 0, 1.0, scale)
        write = scale * torch.sigmoid(self.write_gate(u).to(wide)) * u
        h, recurrent = elementwise_scan(write, log_decay, state.recurrent, cu_seqlens, signed)
        # the other branch gates the output
        gate = F.gelu(self.gate(x), approximate="tanh")
        return self.out_proj(h.to(gate.dtype) * gate), RgLruState(conv, recurrent, seen)

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> RgLruState:
        conv, recurrent = super().new_state(batch_size, max_length, device, dtype)
        return RgLruState(conv, recurrent, torch.zeros(batch_size, dtype=torch.int64, device=recurrent.device))

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        gates = sum(m.flops(length, batch_size) for m in self.modules() if isinstance(m, BlockLinear))
        return gates + super().sequence_flops(length, batch_size)


class BlockLinear(nn.Module):
    """A block-diagonal linear map of ``[B, T, E]`` in H blocks; weight ``[H, E / H, E / H]`` (from, to)."""

    projections = ("weight",)
    fan_in_dims: ClassVar[dict[str, int]] = {"weight": 1}

    def __init__(self, width: int, heads: int):
        super().__init__()
        block = width // heads
        self.weight = nn.Parameter(torch.randn(heads, block, block) * block**-0.5)
        self.bias = nn.Parameter(torch.zeros(heads, block))

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, self.bias.shape)
        return (torch.einsum("bthi,hij->bthj", blocks, self.weight) + self.bias).flatten(-2)

    def flops(self, length: int, batch_size: int = 1) -> int:
        return 2 * batch_size * length * self.weight.numel()


def complement(log_decay: Tensor, signed: bool) -> Tensor:
    """``sqrt(1 - a^2)`` without cancellation, for ``a = exp(log_decay)`` or, ``signed``, ``2 exp(log_decay) - 1``."""
    square = -4 * log_decay.exp() * torch.expm1(log_decay) if signed else -torch.expm1(2 * log_decay)
    steep = square.detach().sqrt() + (square - square.detach()) / (2 * SMALLEST**0.5)
    return torch.where(square < SMALLEST, steep, square.clamp(min=SMALLEST).sqrt())
