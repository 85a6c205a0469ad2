"""S4D: the diagonal state-space model with fixed dynamics, a convolution in training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.mixer import Boundaries, LayerConfig, row_count
from seqarch.layers.modules import long_conv
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear
from seqarch.layers.recurrent_mixer import RecurrentMixer, RecurrentState
from seqarch.ops.chunked.packing import over_sequences
from seqarch.ops.dispatch.autocast import without_autocast
from seqarch.ops.dispatch.checks import unknown_name


def _legs(states: int) -> Tensor:
    """The frequencies of the normal part of HiPPO-LegS, whose eigenvalues are conjugate pairs."""
    root = (2 * torch.arange(2 * states, dtype=torch.float64) + 1).sqrt()
    skew = (torch.outer(root, root) / 2).triu(1)
    return torch.linalg.eigvalsh(1j * (skew - skew.T))[states:]


def _inv(states: int) -> Tensor:
    n, width = torch.arange(states, dtype=torch.float64), 2 * states
    return width / math.pi * (width / (2 * n + 1) - 1)


FREQUENCIES = {
    "lin": lambda states: math.pi * torch.arange(states, dtype=torch.float64),
    "inv": _inv,
    "legs": _legs,
}
"""The imaginary parts of A, by initialisation; its real parts are -1/2."""


@dataclass(frozen=True, kw_only=True)
class S4dConfig(LayerConfig):
    """Options of :class:`S4d`.

    Attributes:
        d_state: N, states per channel: N / 2 conjugate pairs, of which one each is held.
        init: frequencies of A at first: ``"lin"``, ``"inv"`` or ``"legs"`` (section 4 of the paper).
        dt_min, dt_max: range of the initial step sizes, log-uniform.
    """

    size_options: ClassVar[dict[str, str]] = {"d_state": "d_state"}

    d_state: int = 64
    init: str = "lin"
    dt_min: float = 0.001
    dt_max: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.d_state % 2:
            raise ValueError(f"d_state must be even, for conjugate pairs, got {self.d_state}")
        if self.init not in FREQUENCIES:
            raise unknown_name("init", self.init, FREQUENCIES)
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min ({self.dt_min}) must not be above dt_max ({self.dt_max})")


class S4d(RecurrentMixer):
    """``h_t = exp(dt A) h_{t-1} + x_t``, ``y_t = 2 Re(C (exp(dt A) - 1) / A h_t) + D x_t``, with A complex, diagonal.

    N / 2 states and one dt per channel, the zero-order hold with B = 1 folded into the output; then
    ``glu(W gelu(y))``. Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models",
    sections 3 and 4. Not Mamba, whose dynamics depend on the input and whose states are real. In the paper B is learnt
    beside C, though only their product matters. A without weight decay; C, D normal; the projection has
    ``nn.Linear``'s initialisation.

    Several tokens are a convolution by FFT, ``O(T log T)`` per channel beside ``O(T N)`` for its kernel and the last
    state; one token is a step. The state is ``[B, D, N / 2, 2]``, real and imaginary parts.
    """

    Config = S4dConfig
    no_weight_decay = ("log_A_real", "A_imag")

    @from_options
    def __init__(self, config: S4dConfig):
        super().__init__(config)
        width, states = config.d_model, config.d_state // 2
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(low, high))
        self.log_A_real = nn.Parameter(torch.full((width, states), math.log(0.5)))
        self.A_imag = nn.Parameter(FREQUENCIES[config.init](states).float().repeat(width, 1))
        self.C = nn.Parameter(torch.randn(width, states, 2) / math.sqrt(2))
        self.D = nn.Parameter(torch.randn(width))
        self.out_proj = Linear(width, 2 * width)
        self.state_shape = (width, states, 2)

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        wide, recurrent = x.to(self.state_dtype), state.recurrent.to(self.state_dtype)
        # in the state's dtype under autocast too: powers of decays near 1 need it
        with without_autocast(x.device):
            y, recurrent = over_sequences(self._system().run, cu_seqlens, recurrent, wide)
        # skip, then the paper's nonlinearity and gated projection
        y = (y + self.D.to(wide.dtype) * wide).to(x.dtype)
        return F.glu(self.out_proj(F.gelu(y)), dim=-1), RecurrentState(None, recurrent)

    def start(self, x: Tensor, cu_seqlens: Boundaries) -> RecurrentState:
        """No numbers in place of zeros: then the carried state's part of the outputs can be left out."""
        return RecurrentState(None, x.new_empty(row_count(x, cu_seqlens), 0))

    def _system(self) -> DiagonalSystem:
        dtype = self.state_dtype
        A = torch.stack([-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype)], dim=-1)
        rate = A * self.log_dt.to(dtype).exp()[:, None, None]
        real, imaginary = rate.unbind(-1)
        # exp(rate) - 1, without cancellation where the rate is small
        growth = torch.stack(
            [torch.expm1(real) * imaginary.cos() - 2 * (imaginary / 2).sin() ** 2, real.exp() * imaginary.sin()], dim=-1
        )
        inverse = A * A.new_tensor([1.0, -1.0]) / A.square().sum(-1, keepdim=True)
        return DiagonalSystem(rate, times(self.C.to(dtype), times(growth, inverse)))

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        width, states, _ = self.state_shape
        if length == 1:
            return 4 * batch_size * width * states
        block = block_length(length)
        kernel = 4 * width * states * block * -(-length // block)
        return (1 + batch_size) * kernel + long_conv.flops(length, width, batch_size)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        return self.flops(1, batch_size)


class DiagonalSystem:
    """``h_t = exp(rate) h_{t-1} + x_t``, ``y_t = 2 Re(weight h_t)``; complex numbers are pairs in the last axis.

    Args:
        rate, weight: ``[D, N, 2]``.
    """

    def __init__(self, rate: Tensor, weight: Tensor):
        self.rate, self.weight = rate, weight

    def run(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x [B, T, D]`` from a state ``[B, D, N, 2]``, or ``[B, 0]`` for nothing, to y and the last state."""
        length = x.shape[1]
        carried = state if state.ndim == 4 else None
        if length == 0:
            return x, x.new_zeros(x.shape[0], *self.rate.shape) if carried is None else carried
        if length == 1:
            return self._step(carried, x)
        block = block_length(length)
        # powers up to T as products of those below the block's length and those of the block
        low = self._powers(torch.arange(block, device=x.device))
        high = self._powers(block * torch.arange(-(-length // block), device=x.device))
        kernel = _combine(times(self.weight.unsqueeze(-2), high), low)[..., :length]
        y = long_conv.long_conv(x, kernel.mT)
        last = _accumulate(x, low, high)
        if carried is not None:
            after = times(self._powers(torch.ones(1, device=x.device)).squeeze(-2), carried)
            y = y + _combine(times(times(self.weight, after).unsqueeze(-2), high), low)[..., :length].mT
            last = last + times(self._powers(torch.full((1,), length, device=x.device)).squeeze(-2), carried)
        return y, last

    def _step(self, carried: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        entering = torch.stack([x.mT, torch.zeros_like(x.mT)], dim=-1)
        state = entering.expand(-1, -1, self.rate.shape[1], -1)
        if carried is not None:
            state = state + times(self._powers(torch.ones(1, device=x.device)).squeeze(-2), carried)
        y = _combine(state.unsqueeze(-2), self.weight.unsqueeze(-2))
        return y.mT, state.contiguous()

    def _powers(self, exponents: Tensor) -> Tensor:
        """``exp(rate l)`` for each exponent l: ``[D, N, L, 2]``."""
        real, imaginary = (part.unsqueeze(-1) * exponents for part in self.rate.unbind(-1))
        size = real.exp()
        return torch.stack([size * imaginary.cos(), size * imaginary.sin()], dim=-1)


def block_length(length: int) -> int:
    """A power of two near the root of ``length``."""
    return 1 << length.bit_length() // 2


def times(a: Tensor, b: Tensor) -> Tensor:
    """The product of complex numbers."""
    (a_real, a_imaginary), (b_real, b_imaginary) = a.unbind(-1), b.unbind(-1)
    return torch.stack([a_real * b_real - a_imaginary * b_imaginary, a_real * b_imaginary + a_imaginary * b_real], -1)


def _combine(left: Tensor, right: Tensor) -> Tensor:
    """``2 Re(sum_n left_n[i] right_n[j])`` at ``i S + j``: of ``[..., D, N, R, 2]`` and ``[D, N, S, 2]``."""
    conjugate = left * left.new_tensor([2.0, -2.0])
    rows = conjugate.movedim(-2, -3).flatten(-2)
    columns = right.movedim(-2, -1).flatten(-3, -2)
    return (rows @ columns).flatten(-2)


def _accumulate(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``sum_t exp(rate (T - 1 - t)) x_t``: ``[B, D, N, 2]``."""
    blocks, block = high.shape[-2], low.shape[-2]
    backwards = F.pad(x.flip(1), (0, 0, 0, blocks * block - x.shape[1])).mT.unflatten(-1, (blocks, block))
    columns = low.movedim(-2, -3).flatten(-2)
    inner = (backwards @ columns).unflatten(-1, (-1, 2)).movedim(-3, -2)
    return times(inner, high).sum(-2)
