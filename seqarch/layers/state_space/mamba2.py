"""Mamba-2: a state-space model with one decay per head, in its dual form of linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.mixer import Boundaries, LayerConfig
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.initialisation import step_size_bias
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.negative_eigenvalues import Attend, signed_linear_attention
from seqarch.layers.modules.norms import GatedRMSNorm
from seqarch.layers.modules.options import check_factors
from seqarch.layers.modules.short_conv import ShortConvolution
from seqarch.layers.recurrent_mixer import LinearMixer
from seqarch.ops.dispatch.checks import unknown_name

OUTPUT_NORMS: dict[str, Literal["before", "after"] | None] = {
    "gate_first": "before",
    "gate_last": "after",
    "none": None,
}


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(LayerConfig):
    """Options of :class:`Mamba2`.

    Attributes:
        d_state: N, the state's width (the key width of the dual form).
        head_dim: P, channels per head.
        expand: the inner width is ``expand D``.
        d_inner: the inner width itself, in place of ``expand``.
        n_groups: G, groups of heads that share B and C.
        conv_width: width of the short convolution over x, B and C.
        output_norm: ``"gate_first"``: ``norm(y silu(z))``; ``"gate_last"``: ``norm(y) silu(z)``; ``"none"``:
            ``y silu(z)``, as in Falcon-H1.
        norm_eps: added to the mean square in that norm.
        in_factors: five constants that multiply what the first projection gives for z, x, B, C and dt (Falcon-H1's
            ``ssm_multipliers``).
        negative_eigenvalues: moves the decay to ``2 exp(dt A) - 1`` in (-1, 1), which lets the model track state
            (Grazzi et al. 2024).
        A_min, A_max: range of the initial ``-A``, uniform.
        dt_min, dt_max, dt_floor: range of the initial step sizes.
        dt_limit_min, dt_limit_max: what every step size is kept between, after its softplus; ``None``: no upper limit.
    """

    may_be_zero: ClassVar[tuple[str, ...]] = ("conv_width", "dt_limit_min")

    size_options: ClassVar[dict[str, str]] = {"d_state": "d_state", "d_inner": "inner_width"}

    head_options: ClassVar[dict[str, str]] = {
        **{"d_state": "keys", "head_dim": "values"},
        **{"d_inner": "inner", "n_groups": "heads"},
    }

    slow_gates: ClassVar[dict[str, float]] = {"A_min": 0.01, "A_max": 0.1, "dt_min": 0.1, "dt_max": 1.0}

    d_state: int = 128
    head_dim: int = 64
    expand: int = 2
    d_inner: int | None = None
    n_groups: int = 1
    conv_width: int = 4
    output_norm: str = "gate_first"
    norm_eps: float = 1e-5
    in_factors: list[float] | None = None
    negative_eigenvalues: bool = False
    A_min: float = 1.0
    A_max: float = 16.0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    dt_limit_min: float = 0.0
    dt_limit_max: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.inner_width % self.head_dim:
            raise ValueError(f"head_dim ({self.head_dim}) must divide the inner width ({self.inner_width})")
        if self.output_norm not in OUTPUT_NORMS:
            raise unknown_name("output_norm", self.output_norm, OUTPUT_NORMS)
        if self.A_min > self.A_max:
            raise ValueError(f"A_min ({self.A_min}) must not be above A_max ({self.A_max})")
        if self.in_factors is not None:
            check_factors("in_factors", self.in_factors, 5)
        if self.dt_limit_max is not None and self.dt_limit_min > self.dt_limit_max:
            raise ValueError(f"dt_limit_min ({self.dt_limit_min}) must not be above dt_limit_max ({self.dt_limit_max})")
        heads = self.inner_width // self.head_dim
        if heads % self.n_groups:
            raise ValueError(f"n_groups ({self.n_groups}) must divide the number of heads ({heads})")

    @property
    def inner_width(self) -> int:
        return self.expand * self.d_model if self.d_inner is None else self.d_inner


class Mamba2(LinearMixer):
    """A state-space model with one decay per head: ``h = exp(dt_t A) h + dt_t B_t x_t``, ``y_t = C_t h + D x_t``.

    Run as linear attention with q = C, k = B, v = dt x; the output is ``norm(y silu(z))`` by default. Dao and Gu 2024,
    "Transformers are SSMs", section 7. Not :class:`Mamba`, whose decay differs by channel and state. Projections have
    ``nn.Linear``'s initialisation, A and dt_bias the release's, A_log, D and dt_bias no weight decay. The state is
    ``[B, H, N, P]``; the norm acts in groups where there are several, as in the release.
    """

    takes_any_state = True

    Config = Mamba2Config

    @from_options
    def __init__(self, config: Mamba2Config):
        super().__init__(config)
        self.inner = config.inner_width
        num_heads = self.inner // config.head_dim
        shared = config.n_groups * config.d_state
        self.sizes = [self.inner, self.inner + 2 * shared, num_heads]
        self.in_proj = Linear(config.d_model, sum(self.sizes), bias=False)
        self.conv = ShortConvolution(self.sizes[1], config.conv_width, "silu", bias=True)
        A = torch.empty(num_heads).uniform_(config.A_min, config.A_max)
        self.A_log = nn.Parameter(A.log())
        bias = step_size_bias(num_heads, config.dt_min, config.dt_max, config.dt_floor)
        self.dt_bias = nn.Parameter(bias)
        self.D = nn.Parameter(torch.ones(num_heads))
        gate = OUTPUT_NORMS[config.output_norm]
        self.norm = GatedRMSNorm(self.inner, gate, config.n_groups, config.norm_eps) if gate else None
        self.out_proj = Linear(self.inner, config.d_model, bias=False)
        self.state_shape = (num_heads, config.d_state, config.head_dim)

    def head_maps(self) -> list[HeadMap]:
        """C, B and x of the dual form (Wang et al. 2024, "The Mamba in the Llama", section 3.1)."""
        heads, size, width = self.sizes[-1], self.config.d_state, self.config.head_dim
        groups, x = self.config.n_groups, self.inner
        B = 2 * x
        return [
            HeadMap("q", "in_proj", groups, size, B + groups * size),
            HeadMap("k", "in_proj", groups, size, B),
            HeadMap("v", "in_proj", heads, width, x),
            HeadMap("o", "out_proj", heads, width),
        ]

    def mix(self, x: Tensor, state: Any, cu_seqlens: Boundaries) -> tuple[Tensor, Any]:
        # one projection for all; x, B and C pass one short convolution together
        shared = self.config.n_groups * self.config.d_state
        z, xbc, dt = self._times_constants(self.in_proj(x), shared).split(self.sizes, dim=-1)
        xbc, conv = self.conv(xbc, state.conv, cu_seqlens)
        u, B, C = xbc.split([self.inner, shared, shared], dim=-1)
        u = rearrange(u, "b t (h p) -> b t h p", p=self.config.head_dim)
        B, C = (rearrange(m, "b t (g n) -> b t g n", g=self.config.n_groups) for m in (B, C))
        # as linear attention: k = B, q = C, v = dt x with decay exp(dt A), in the state's dtype
        wide = self.state_dtype
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if self.config.dt_limit_min or self.config.dt_limit_max is not None:
            dt = dt.clamp(min=self.config.dt_limit_min, max=self.config.dt_limit_max)
        values = (u * dt.unsqueeze(-1)).to(u.dtype)
        log_decay = -self.A_log.to(wide).exp() * dt
        y, state = self.over_time(x, C, B, values, log_decay, state, cu_seqlens)
        # skip, then gate and norm over the inner width
        y = rearrange(y + self.D.to(u.dtype).unsqueeze(-1) * u, "b t h p -> b t (h p)")
        gated = y * F.silu(z) if self.norm is None else self.norm(y, z)
        return self.out_proj(gated), state._replace(conv=conv)

    def over_time(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Any, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Any]:
        """The outputs ``[B, T, H, P]`` and the state, with what is recurrent in it after them; x as ``mix`` got it."""
        given = {"scale": 1.0, "state": state.recurrent, "cu_seqlens": cu_seqlens}
        y, recurrent = self.signed(ops.linear_attention)(q, k, v, log_decay=log_decay, **given)
        return y, state._replace(recurrent=recurrent)

    def signed(self, attend: Attend) -> Attend:
        """A linear attention as it is, or with decays in (-1, 1)."""
        return partial(signed_linear_attention, attend=attend) if self.config.negative_eigenvalues else attend

    def _times_constants(self, projected: Tensor, shared: int) -> Tensor:
        """z, x, B, C and dt side by side, each times its constant of ``in_factors``; B and C are ``shared`` wide."""
        if self.config.in_factors is None:
            return projected
        sizes = (self.inner, self.inner, shared, shared, self.sizes[2])
        factors = zip(self.config.in_factors, sizes, strict=True)
        return projected * torch.cat([projected.new_full((size,), factor) for factor, size in factors])
