"""HGRN: an elementwise recurrence with a bounded forget gate and a state that turns in the complex plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.mixer import Boundaries, LayerConfig, row_count
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear, widened
from seqarch.layers.modules.positions import token_positions
from seqarch.layers.recurrent.base import ElementwiseMixer, elementwise_scan
from seqarch.layers.recurrent_mixer import RecurrentState


@dataclass(frozen=True, kw_only=True)
class HgrnConfig(LayerConfig):
    """Options of :class:`Hgrn`.

    Attributes:
        lower_bound: the least value of the forget gate, below 1. The paper learns it and has it grow with depth.
        d_inner: E, the channels of the recurrence, each complex; by default D.
        complex_state: whether the state is complex and turns, as in the paper, or real and twice as wide.
    """

    may_be_zero: ClassVar[tuple[str, ...]] = ("lower_bound",)

    size_options: ClassVar[dict[str, str]] = {"d_inner": "inner_width"}

    lower_bound: float = 0.0
    d_inner: int | None = None
    complex_state: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.lower_bound >= 1:
            raise ValueError(f"lower_bound must be below 1, got {self.lower_bound}")

    @property
    def inner_width(self) -> int:
        return self.d_model if self.d_inner is None else self.d_inner


class Hgrn(ElementwiseMixer):
    """``h_t = f_t exp(i theta) h_{t-1} + (1 - f_t) c_t``, ``f_t = l + (1 - l) sigmoid(W_f x)``, ``c_t = silu(W_c x)``.

    E complex channels with one gate and one learnt angle theta each; the output is ``W_o (norm(h) silu(W_g x))`` over
    their 2 E real and imaginary parts. Qin et al. 2023, "Hierarchically Gated Recurrent Neural Network for Sequence
    Modeling", section 3. Not HGRN2, whose state is a matrix. The bound l is an option of each layer, since a mixer
    does not know its depth; the paper's is a cumulative softmax over the layers, 0 in the first. Norm and output gate
    are those of the release. ``theta_j = 10000^(-2 j / E)`` at first; projections have ``nn.Linear``'s initialisation.

    The state is ``[B, 2 E, 1]``. It is carried in the fixed frame, and each call turns with its own positions:
    ``exp(-i theta t) h_t`` is an elementwise recurrence with the real decay f.
    """

    Config = HgrnConfig

    @from_options
    def __init__(self, config: HgrnConfig):
        super().__init__(config)
        width, inner = config.d_model, config.inner_width
        gates = 1 if config.complex_state else 2
        self.in_proj = Linear(width, 2 * inner)
        self.forget = Linear(width, gates * inner)
        self.gate = Linear(width, 2 * inner)
        if config.complex_state:
            self.theta = nn.Parameter(10000.0 ** (-2 / inner * torch.arange(inner)))
        self.norm = nn.LayerNorm(2 * inner)
        self.out_proj = Linear(2 * inner, width)
        self.state_shape = (2 * inner, 1)

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        recurrent = state.recurrent
        f = self.forget(x).to(self.state_dtype)  # logits, [B, T, E] or [B, T, 2 E]
        # 1 - f and log f without the cancellation of computing f: at a bound of 0 the latter is the log-sigmoid
        write = (1 - self.config.lower_bound) * torch.sigmoid(-f)
        log_decay = torch.log1p(-write) if self.config.lower_bound else F.logsigmoid(f)
        candidate = F.silu(self.in_proj(x)).to(f.dtype)
        # the recurrence: real and imaginary parts share a gate
        if self.config.complex_state:
            h, recurrent = self._turning(
                candidate, write.repeat(1, 1, 2), log_decay.repeat(1, 1, 2), recurrent, cu_seqlens
            )
        else:
            h, recurrent = elementwise_scan(write * candidate, log_decay, recurrent, cu_seqlens)
        h = widened(self.norm, h)  # in the state's dtype, before it is rounded to that of x
        return self.out_proj(h.to(x.dtype) * F.silu(self.gate(x))), RecurrentState(None, recurrent)

    def _turning(
        self, candidate: Tensor, write: Tensor, log_decay: Tensor, recurrent: Tensor, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(row_count(candidate, cu_seqlens), dtype=torch.int64, device=candidate.device)
        positions, lengths = token_positions(nothing, candidate.shape[1], cu_seqlens)
        # float64: the angle of a late token would lose its fraction of a turn
        angle = (positions + 1).unsqueeze(-1) * self.theta.double()
        turned = turn(write * candidate, -angle)
        h, recurrent = elementwise_scan(turned, log_decay, recurrent, cu_seqlens)
        last = lengths.unsqueeze(-1) * self.theta.double()
        return turn(h, angle), turn(recurrent.squeeze(-1), last).unsqueeze(-1)


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """``x [..., 2 E]``, E real parts and then E imaginary ones, times ``exp(i angle)``."""
    real, imaginary = x.chunk(2, dim=-1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
