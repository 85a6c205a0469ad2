"""minGRU: a gated recurrent unit whose gate and candidate do not see the state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.mixer import Boundaries, LayerConfig
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear
from seqarch.layers.recurrent.base import ElementwiseMixer, elementwise_scan
from seqarch.layers.recurrent_mixer import RecurrentState
from seqarch.ops.dispatch.checks import unknown_name

CANDIDATES = {
    "linear": lambda x: x,
    "positive": lambda x: torch.where(x >= 0, x + 0.5, torch.sigmoid(x)),
}


@dataclass(frozen=True, kw_only=True)
class MinGruConfig(LayerConfig):
    """Options of :class:`MinGru`.

    Attributes:
        expand: the inner width is ``expand D``.
        d_inner: the inner width itself, in place of ``expand``.
        candidate: ``"linear"``, or ``"positive"``: above 0, as the paper's form in logarithms needs it (appendix B).
        negative_eigenvalues: ``h_t = (1 - 2 z_t) h_{t-1} + 2 z_t c_t`` with a decay in (-1, 1), which lets the model
            track state (Grazzi et al. 2024).
    """

    size_options: ClassVar[dict[str, str]] = {"d_inner": "inner_width"}

    expand: int = 1
    d_inner: int | None = None
    candidate: str = "linear"
    negative_eigenvalues: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.candidate not in CANDIDATES:
            raise unknown_name("candidate", self.candidate, CANDIDATES)

    @property
    def inner_width(self) -> int:
        return self.expand * self.d_model if self.d_inner is None else self.d_inner


class MinGru(ElementwiseMixer):
    """``h_t = (1 - z_t) h_{t-1} + z_t c_t`` with ``z_t = sigmoid(W_z x + b_z)`` and ``c_t = W_c x + b_c``.

    Feng et al. 2024, "Were RNNs All We Needed?", section 3.1. Not a GRU, whose gates see ``h_{t-1}``, nor RG-LRU or
    HGRN, which gate their output too. The state starts at 0 and is itself the output, through a projection where
    the inner width is not D. Projections have ``nn.Linear``'s initialisation.
    """

    Config = MinGruConfig

    @from_options
    def __init__(self, config: MinGruConfig):
        super().__init__(config)
        inner = config.inner_width
        self.in_proj = Linear(config.d_model, 2 * inner)
        self.out_proj = nn.Identity() if inner == config.d_model else Linear(inner, config.d_model, bias=False)
        self.state_shape = (inner, 1)

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        recurrent = state.recurrent
        # both from x alone, so that the recurrence is a scan
        gate, candidate = self.in_proj(x).chunk(2, dim=-1)
        gate, signed = gate.to(self.state_dtype), self.config.negative_eigenvalues
        write = torch.sigmoid(gate) * CANDIDATES[self.config.candidate](candidate)
        # 1 - sigmoid(z) is exp(-softplus(z)), without cancellation
        h, recurrent = elementwise_scan((2 if signed else 1) * write, -F.softplus(gate), recurrent, cu_seqlens, signed)
        return self.out_proj(h.to(candidate.dtype)), RecurrentState(None, recurrent)
