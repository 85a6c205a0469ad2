"""Mamba-2: a state-space model with one decay a head, in its dual form of linear attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.initialisation import step_size_bias
from seqarch.layers.mixer import LayerConfig, linear_flops
from seqarch.layers.norms import GatedRMSNorm
from seqarch.layers.recurrent import RecurrentMixer, RecurrentState
from seqarch.layers.short_conv import ShortConvolution
from seqarch.ops.linear_attention import flops as recurrence_flops


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(LayerConfig):
    """Options of :class:`Mamba2`.

    Attributes:
        d_state: N, the state's width (the key width of the dual form).
        head_dim: P, channels a head.
        expand: the inner width is ``expand D``.
        n_groups: G, groups of heads that share B and C.
        conv_width: width of the short convolution over x, B and C.
        A_min, A_max: range of the initial ``-A``, uniform.
        dt_min, dt_max, dt_floor: range of the initial step sizes.
    """

    d_state: int = 128
    head_dim: int = 64
    expand: int = 2
    n_groups: int = 1
    conv_width: int = 4
    A_min: float = 1.0
    A_max: float = 16.0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        inner = self.expand * self.d_model
        if inner % self.head_dim:
            raise ValueError(f"head_dim ({self.head_dim}) must divide expand * d_model ({inner})")
        if self.A_min > self.A_max:
            raise ValueError(f"A_min ({self.A_min}) must not be above A_max ({self.A_max})")
        heads = inner // self.head_dim
        if heads % self.n_groups:
            raise ValueError(f"n_groups ({self.n_groups}) must divide the number of heads ({heads})")


class Mamba2(RecurrentMixer):
    """A state-space model with one decay a head: ``h = exp(dt_t A) h + dt_t B_t x_t``, ``y_t = C_t h + D x_t``.

    Run as linear attention with q = C, k = B, v = dt x; the output is ``norm(y silu(z))``. Dao and Gu 2024,
    "Transformers are SSMs", section 7. Not :class:`Mamba`, whose decay differs by channel and state. Projections have
    ``nn.Linear``'s initialisation, A and dt_bias the release's, A_log, D and dt_bias no weight decay. The state is
    ``[B, H, N, P]``; the norm acts in groups where there are several, as in the release.
    """

    Config = Mamba2Config

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = config
        self.inner = config.expand * config.d_model
        num_heads = self.inner // config.head_dim
        shared = config.n_groups * config.d_state
        self.sizes = [self.inner, self.inner + 2 * shared, num_heads]
        self.input = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        self.conv = ShortConvolution(self.sizes[1], config.conv_width, "silu", bias=True)
        A = torch.empty(num_heads).uniform_(config.A_min, config.A_max)
        self.A_log = nn.Parameter(A.log())
        bias = step_size_bias(num_heads, config.dt_min, config.dt_max, config.dt_floor)
        self.dt_bias = nn.Parameter(bias)
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = GatedRMSNorm(self.inner, gate="before", groups=config.n_groups)
        self.output = nn.Linear(self.inner, config.d_model, bias=False)
        self.memory_shape = (num_heads, config.d_state, config.head_dim)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, RecurrentState]:
        conv, memory = (None, None) if state is None else state
        z, xbc, dt = self.input(x).split(self.sizes, dim=-1)
        xbc, conv = self.conv(xbc, conv, cu_seqlens)
        shared = self.config.n_groups * self.config.d_state
        u, B, C = xbc.split([self.inner, shared, shared], dim=-1)
        u = rearrange(u, "b t (h p) -> b t h p", p=self.config.head_dim)
        B, C = (rearrange(m, "b t (g n) -> b t g n", g=self.config.n_groups) for m in (B, C))
        wide = self.memory_dtype
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        values = (u * dt.unsqueeze(-1)).to(u.dtype)
        log_decay = -self.A_log.to(wide).exp() * dt
        y, memory = ops.linear_attention(C, B, values, log_decay, scale=1.0, state=memory, cu_seqlens=cu_seqlens)
        y = y + self.D.to(u.dtype).unsqueeze(-1) * u
        return self.output(self.norm(rearrange(y, "b t h p -> b t (h p)"), z)), RecurrentState(conv, memory)

    def flops(self, length: int, batch_size: int = 1) -> int:
        tokens = batch_size * length
        own = linear_flops(self.input, tokens) + linear_flops(self.output, tokens)
        return (
            own
            + self.conv.flops(length, batch_size)
            + recurrence_flops(length, *self.memory_shape, batch_size=batch_size)
        )
