"""Mamba-3: a state-space model with a trapezoidal rule, a rotating state and, as an option, several inputs per head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.mixer import Boundaries, Device, LayerConfig, first_tensor
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.initialisation import step_size_bias
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import GatedRMSNorm, HeadNorm
from seqarch.layers.modules.positions import tokens_before
from seqarch.layers.modules.rotary import rotate
from seqarch.layers.recurrent_mixer import RecurrentMixer
from seqarch.ops.chunked.packing import over_sequences
from seqarch.ops.linear_attention import flops as recurrence_flops


@dataclass(frozen=True, kw_only=True)
class Mamba3Config(LayerConfig):
    """Options of :class:`Mamba3`.

    Attributes:
        d_state: N, the state's width (the key width of the dual form).
        head_dim: P, channels per head.
        expand: the inner width is ``expand D``.
        num_heads: H, in place of ``expand``: the inner width is ``H P``.
        n_groups: G, groups of heads that share B and C.
        mimo_rank: R, inputs and outputs per head and step (MIMO); 1 for the plain model.
        rotary_fraction: share of the state that rotates.
        output_norm: an RMS norm per head before the gate, as in the paper's hybrids.
        A_floor: the least ``-A``.
        dt_min, dt_max, dt_floor: range of the initial step sizes.
    """

    size_options: ClassVar[dict[str, str]] = {"d_state": "d_state", "num_heads": "heads", "head_dim": "head_dim"}

    head_options: ClassVar[dict[str, str]] = {
        **{"d_state": "keys", "head_dim": "values"},
        **{"num_heads": "heads", "n_groups": "heads"},
    }

    d_state: int = 128
    head_dim: int = 64
    expand: int = 2
    num_heads: int | None = None
    n_groups: int = 1
    mimo_rank: int = 1
    rotary_fraction: float = 0.5
    output_norm: bool = False
    A_floor: float = 1e-4
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if self.inner % self.head_dim:
            raise ValueError(f"head_dim ({self.head_dim}) must divide the inner width ({self.inner})")
        if self.heads % self.n_groups:
            raise ValueError(f"n_groups ({self.n_groups}) must divide the number of heads ({self.heads})")
        if self.d_state % 2 or self.rotary_fraction > 1 or not self.angles:
            raise ValueError(
                "rotation needs an even d_state, a rotary_fraction of at most 1 and a pair to turn,"
                f" got d_state {self.d_state} and rotary_fraction {self.rotary_fraction}"
            )

    @property
    def inner(self) -> int:
        return self.expand * self.d_model if self.num_heads is None else self.num_heads * self.head_dim

    @property
    def heads(self) -> int:
        return self.inner // self.head_dim

    @property
    def angles(self) -> int:
        """Pairs of the state's channels that turn."""
        return int(self.rotary_fraction * self.d_state) // 2


class Mamba3State(NamedTuple):
    """State of :class:`Mamba3`.

    Attributes:
        recurrent: ``[B, H, N, P]``, without what the last token has begun to write.
        angle: by how much B and C are turned by now, ``[B, H, angles]``.
        key, value: the last token's B, turned, ``[B, H, R, N]`` and its x, ``[B, H, P]``.
        weight: ``lambda dt`` of the last token, ``[B, H]``.
    """

    recurrent: Tensor
    angle: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor


class Mamba3(RecurrentMixer):
    """``h_t = a_t h_{t-1} + (1 - l_t) dt_t a_t B_{t-1} x_{t-1} + l_t dt_t B_t x_t``, ``y_t = C_t h_t + D x_t``.

    The exponential-trapezoidal rule, with ``a = exp(dt A)`` and ``l = sigmoid(W_l x)``; A depends on the input too. B
    and C pass an RMS norm, are given a bias per head and turned by the sum of ``pi tanh(W_r x) dt`` so far, which makes
    the state complex. The output is ``y silu(z)``. There is no short convolution. With ``mimo_rank`` R, B and C are R
    each, and x, z and y are scaled channel by channel to and from R. Lahoti et al. 2026, "Mamba-3: Improved Sequence
    Modeling using State Space Principles", sections 3.1-3.3. Not Mamba-2, which sees a token's input at that token
    alone. Initialisation, and A by ``1 + u`` (``1 / (1 - u)`` below 0), as in the release, which turns neighbouring
    channels where R is 1; here, as in its MIMO form, channels i and ``i + N / 2``: the same up to an order of channels.

    The write of token t is known only at t + 1, so one ``linear_attention`` runs a step late, over the tokens before
    each, and a token's own part ``l_t dt_t (C_t . B_t) x_t`` is added to its output.
    """

    Config = Mamba3Config

    @from_options
    def __init__(self, config: Mamba3Config):
        super().__init__(config)
        heads, rank, size = config.heads, config.mimo_rank, config.d_state
        shared = rank * config.n_groups * size
        self.sizes = [config.inner, config.inner, shared, shared, heads, heads, heads, config.angles]
        self.in_proj = Linear(config.d_model, sum(self.sizes), bias=False)
        self.dt_bias = nn.Parameter(step_size_bias(heads, config.dt_min, config.dt_max, config.dt_floor))
        self.B_norm, self.C_norm = HeadNorm(size, eps=1e-5), HeadNorm(size, eps=1e-5)
        self.B_bias = nn.Parameter(torch.ones(heads, rank, size))
        self.C_bias = nn.Parameter(torch.ones(heads, rank, size))
        self.D = nn.Parameter(torch.ones(heads))
        if rank > 1:
            self.mimo_x = nn.Parameter(torch.full((heads, rank, config.head_dim), 1 / rank))
            self.mimo_z = nn.Parameter(torch.ones(heads, rank, config.head_dim))
            self.mimo_y = nn.Parameter(torch.full((heads, rank, config.head_dim), 1 / rank))
        self.norm = GatedRMSNorm(config.inner, "after", heads) if config.output_norm else None
        self.out_proj = Linear(config.inner, config.d_model, bias=False)
        self.state_shape = (heads, size, config.head_dim)

    def head_maps(self) -> list[HeadMap]:
        """C, B and u as of Mamba-2; with several inputs per head, each of them."""
        config, inner = self.config, self.config.inner
        shared, B = self.sizes[2], 2 * inner
        several = config.mimo_rank * config.n_groups, config.d_state
        keys = [HeadMap("k", "in_proj", *several, B), HeadMap("q", "in_proj", *several, B + shared)]
        heads = config.heads, config.head_dim
        maps = [one for each in keys for one in each.split(config.mimo_rank)]
        return [*maps, HeadMap("v", "in_proj", *heads, inner), HeadMap("o", "out_proj", *heads)]

    def mix(self, x: Tensor, state: Mamba3State, cu_seqlens: Boundaries) -> tuple[Tensor, Mamba3State]:
        recurrent, angle, key, value, weight = state
        # one projection for all: z, u [B, T, H, P], B, C [B, T, R G N], a step size, decay and mixture per head
        z, u, B, C, dt, A, mix, turn = self.in_proj(x).split(self.sizes, dim=-1)
        z, u = (rearrange(m, "b t (h p) -> b t h p", p=self.config.head_dim) for m in (z, u))
        # decay and rotation of each step, in the state's dtype: both add up over the sequence
        wide = self.state_dtype
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        log_decay = -_heavy_tail(A.to(wide)).clamp(min=self.config.A_floor) * dt
        steps = math.pi * torch.tanh(turn.to(wide)).unsqueeze(-2) * dt.unsqueeze(-1)
        angles, angle = over_sequences(_turn, cu_seqlens, angle, steps)
        B, C = self._turned(B, self.B_norm, self.B_bias, angles), self._turned(C, self.C_norm, self.C_bias, angles)
        # the trapezoidal rule: a token's share now, the rest of it one step later, so the last token is carried
        own = mix.to(wide).sigmoid() * dt
        last_B, key = over_sequences(tokens_before, cu_seqlens, key, B)
        last_u, value = over_sequences(tokens_before, cu_seqlens, value, u)
        last_own, weight = over_sequences(tokens_before, cu_seqlens, weight, own)
        written = log_decay.exp() * (last_own + dt - own)
        v, last_v = self._up(u, own), self._up(last_u, written)
        # a step late, so the state holds what is complete; the token's own part is added to the output
        y, recurrent = self._recurrence(C, last_B, last_v, log_decay, recurrent, cu_seqlens)
        y = y + (C @ B.mT) @ v + self.D.to(u.dtype)[:, None, None] * self._up(u)
        return self.out_proj(self._gated(y, z)), Mamba3State(recurrent, angle, key, value, weight)

    def _turned(self, m: Tensor, norm: HeadNorm, bias: Tensor, angles: Tensor) -> Tensor:
        """B or C from its projection: normalised, shared out over the heads and turned, ``[B, T, H, R, N]``."""
        config = self.config
        m = norm(rearrange(m, "b t (r g n) -> b t g r n", r=config.mimo_rank, n=config.d_state))
        m = m.repeat_interleave(config.heads // config.n_groups, dim=2) + bias.to(m.dtype)
        angles = F.pad(angles, (0, config.d_state // 2 - config.angles)).unsqueeze(-2)
        return rotate(m, (angles.cos(), angles.sin()))

    def _up(self, u: Tensor, weight: Tensor | None = None) -> Tensor:
        """``u: [B, T, H, P]`` times ``weight: [B, T, H]``, for each of the R inputs: ``[B, T, H, R, P]``."""
        u = (u if weight is None else (u * weight.unsqueeze(-1)).to(u.dtype)).unsqueeze(-2)
        return u * self.mimo_x.to(u.dtype) if self.config.mimo_rank > 1 else u

    def _recurrence(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, recurrent: Tensor, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Tensor]:
        """Linear attention with R tokens per step, of which the first decays and each reads what all R wrote."""
        rank = self.config.mimo_rank
        queries, keys, values = (rearrange(m, "b t h r d -> b (t r) h d") for m in (q, k, v))
        decays = F.pad(log_decay.unsqueeze(2), (0, 0, 0, rank - 1)).flatten(1, 2)
        cu_seqlens = None if cu_seqlens is None else tuple(rank * boundary for boundary in cu_seqlens)
        y, recurrent = ops.linear_attention(
            queries, keys, values, decays, scale=1.0, state=recurrent, cu_seqlens=cu_seqlens
        )
        y = rearrange(y, "b (t r) h p -> b t h r p", r=rank)
        return (y + (q @ k.mT).triu(1) @ v if rank > 1 else y), recurrent

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """``norm(y) silu(z)`` for each of the R outputs, and their sum: ``[B, T, H P]``."""
        several = self.config.mimo_rank > 1
        z = z.unsqueeze(-2) * self.mimo_z.to(z.dtype) if several else z.unsqueeze(-2)
        if self.norm is None:
            y = y * F.silu(z)
        else:
            flat = (rearrange(m, "b t h r p -> b t r (h p)") for m in (y, z))
            y = rearrange(self.norm(*flat), "b t r (h p) -> b t h r p", h=self.config.heads)
        y = y * self.mimo_y.to(y.dtype) if several else y
        return rearrange(y.sum(-2), "b t h p -> b t (h p)")

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> Mamba3State:
        config, recurrent = self.config, super().new_state(batch_size, max_length, device, dtype).recurrent
        like = {"device": recurrent.device, "dtype": dtype or first_tensor(self).dtype}
        key = torch.zeros(batch_size, config.heads, config.mimo_rank, config.d_state, **like)
        value = torch.zeros(batch_size, config.heads, config.head_dim, **like)
        angle = recurrent.new_zeros(batch_size, config.heads, config.angles)
        return Mamba3State(recurrent, angle, key, value, recurrent.new_zeros(batch_size, config.heads))

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        rank = self.config.mimo_rank
        heads, size, width = self.state_shape
        steps = recurrence_flops(length * rank, *self.state_shape, batch_size=batch_size)
        within = 2 * batch_size * length * heads * rank**2 * (size + width)
        return steps + within * (2 if rank > 1 else 1)


def _heavy_tail(u: Tensor) -> Tensor:
    """``1 + u`` where u is positive, ``1 / (1 - u)`` where it is not."""
    return u.clamp(min=0) + (1 - u.clamp(max=0)).reciprocal()


def _turn(angle: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of all steps so far, ``[B, T, ...]``, and the last one: in float64, modulo a whole turn."""
    total = torch.cat([angle.unsqueeze(1), steps], dim=1).double().cumsum(1) % (2 * math.pi)
    return total[:, 1:].to(steps.dtype), total[:, -1].to(steps.dtype)
