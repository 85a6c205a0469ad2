"""Mamba: the selective state-space model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.mixer import Boundaries, LayerConfig
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.initialisation import step_size_bias
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import HeadNorm
from seqarch.layers.modules.short_conv import ShortConvolution
from seqarch.layers.recurrent.base import elementwise_scan
from seqarch.layers.recurrent_mixer import RecurrentMixer, RecurrentState
from seqarch.ops.dispatch.checks import unknown_name
from seqarch.ops.selective_scan import flops as scan_flops

SELECTION_NORMS = ("none", "rms", "rms_without_weights")


@dataclass(frozen=True, kw_only=True)
class MambaConfig(LayerConfig):
    """Options of :class:`Mamba`.

    Attributes:
        d_state: N, states per channel.
        expand: the inner width is ``expand D``.
        d_inner: the inner width itself, in place of ``expand``.
        conv_width: width of the short convolution.
        dt_rank: rank of the step size's projection; by default ``ceil(D / 16)``.
        dt_bc_norm: a norm of what the step size is projected from, of B and of C: ``"rms"`` (Jamba),
            ``"rms_without_weights"`` (FalconMamba) or ``"none"``.
        norm_eps: added to the mean square in those norms.
        negative_eigenvalues: moves the decays to ``2 exp(dt A) - 1`` in (-1, 1), which lets the model track state
            (Grazzi et al. 2024). Each state then is a channel of its own, so the scan takes N times the memory.
        A_scale: the initial ``-A`` is ``A_scale (1..N)``.
        dt_min, dt_max, dt_floor: range of the initial step sizes.
    """

    size_options: ClassVar[dict[str, str]] = {"d_state": "d_state", "d_inner": "inner_width"}

    head_options: ClassVar[dict[str, str]] = {"d_inner": "inner"}

    slow_gates: ClassVar[dict[str, float]] = {"A_scale": 0.01, "dt_min": 0.1, "dt_max": 1.0}

    d_state: int = 16
    expand: int = 2
    d_inner: int | None = None
    conv_width: int = 4
    dt_rank: int | None = None
    dt_bc_norm: str = "none"
    norm_eps: float = 1e-6
    negative_eigenvalues: bool = False
    A_scale: float = 1.0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if self.dt_bc_norm not in SELECTION_NORMS:
            raise unknown_name("dt_bc_norm", self.dt_bc_norm, SELECTION_NORMS)

    @property
    def inner_width(self) -> int:
        return self.expand * self.d_model if self.d_inner is None else self.d_inner


class Mamba(RecurrentMixer):
    """A selective state-space model: ``h = exp(dt_t A) h + dt_t B_t x_t``, ``y_t = (C_t h + D x_t) silu(z_t)``.

    dt, B and C depend on the input, A does not; E = ``expand D`` channels with N states each. Gu and Dao 2023,
    "Mamba", algorithm 2 and figure 3; norms of dt, B and C as in Jamba are an option. Not Mamba-2, which has one decay
    per head. ``A = -(1..N)``, D and dt as in the release, without weight decay on A_log, D and the bias of dt; other
    projections have ``nn.Linear``'s initialisation (the release also divides the output's by the square root of the
    depth: a stack's choice, not made).
    """

    takes_any_state = True

    Config = MambaConfig
    unquantized = ("dt",)
    no_weight_decay = ("A_log",)

    @from_options
    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.inner = config.inner_width
        rank = config.dt_rank or math.ceil(config.d_model / 16)
        self.sizes = [rank, config.d_state, config.d_state]
        self.in_proj = Linear(config.d_model, 2 * self.inner, bias=False)
        self.conv = ShortConvolution(self.inner, config.conv_width, "silu", bias=True)
        self.select = Linear(self.inner, sum(self.sizes), bias=False)
        if config.dt_bc_norm != "none":
            weights = "ones" if config.dt_bc_norm == "rms" else "none"
            self.dt_norm, self.B_norm, self.C_norm = (
                HeadNorm(size, eps=config.norm_eps, weights=weights) for size in self.sizes
            )
        self.dt = Linear(rank, self.inner)
        with torch.no_grad():
            self.dt.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt.bias.copy_(step_size_bias(self.inner, config.dt_min, config.dt_max, config.dt_floor))
        A = config.A_scale * torch.arange(1, config.d_state + 1).float().repeat(self.inner, 1)
        self.A_log = nn.Parameter(A.log())
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = Linear(self.inner, config.d_model, bias=False)
        self.state_shape = (self.inner, config.d_state)

    def head_maps(self) -> list[HeadMap]:
        """u is the values and, of every channel alone, what is read; B and C are made of u, and not of the input."""
        return [HeadMap("v", "in_proj", self.inner, None), HeadMap("o", "out_proj", self.inner, None)]

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        conv, recurrent = state
        # u enters the recurrence, z gates its output: [B, T, E] each
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = self.conv(u, conv, cu_seqlens)
        # what makes it selective: step size, write and read vectors [B, T, N] depend on u
        dt, B, C = self.select(u).split(self.sizes, dim=-1)
        if self.config.dt_bc_norm != "none":
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        # by exp2: of this size, torch's exp takes 4 times as long, and starts the threads for it
        A = -(self.A_log.to(self.state_dtype) / math.log(2)).exp2()
        if self.config.negative_eigenvalues:
            y, recurrent = self._signed_scan(u, self.dt(dt), A, B, C, recurrent, cu_seqlens)
            return self.out_proj(y * F.silu(z)), RecurrentState(conv, recurrent)
        # softplus of dt, skip by D and gate by z are the operation's, which saves passes over [B, T, E]
        y, recurrent = ops.selective_scan(
            *(u, self.dt(dt), A, B, C, self.D), z=z, dt_softplus=True, state=recurrent, cu_seqlens=cu_seqlens
        )
        return self.out_proj(y), RecurrentState(conv, recurrent)

    def _signed_scan(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, recurrent: Tensor, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Tensor]:
        """The scan without its gate, as one of ``E N`` channels: a decay below 0 is no power of a step size."""
        delta = F.softplus(dt.to(A.dtype)).unsqueeze(-1)
        write = delta * u.unsqueeze(-1) * B.unsqueeze(-2)
        recurrent = recurrent.flatten(1).unsqueeze(-1)
        h, recurrent = elementwise_scan(write.flatten(2), (delta * A).flatten(2), recurrent, cu_seqlens, signed=True)
        y = (h.unflatten(-1, self.state_shape) * C.to(h.dtype).unsqueeze(-2)).sum(-1)
        return y.to(u.dtype) + self.D.to(u.dtype) * u, recurrent.view(-1, *self.state_shape)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return scan_flops(length, *self.state_shape, batch_size=batch_size)
