"""The base of recurrences whose gates read their own last output, token after token: sLSTM, LSTM and GRU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from seqarch import ops
from seqarch.layers.mixer import Boundaries, LayerConfig
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear
from seqarch.layers.recurrent_mixer import RecurrentMixer, RecurrentState
from seqarch.ops.gated_rnn import CELLS
from seqarch.ops.gated_rnn import flops as rnn_flops


@dataclass(frozen=True, kw_only=True)
class GatedRnnConfig(LayerConfig):
    """Options of recurrences whose gates read their last output.

    Attributes:
        num_heads: H; gates read the outputs of their own head alone.
        head_dim: W, channels of a head; by default ``D / H``.
    """

    size_options: ClassVar[dict[str, str]] = {"head_dim": "head_width"}

    num_heads: int = 1
    head_dim: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must divide d_model ({self.d_model})")

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim


class GatedRnnMixer(RecurrentMixer):
    """A mixer on ``ops.gated_rnn``: subclasses name their ``cell``, and make what the input gives to its gates."""

    fan_in_dims: ClassVar[dict[str, int]] = {"recurrent_weight": 3}

    cell: ClassVar[str]
    out_proj: nn.Linear

    @from_options
    def __init__(self, config: GatedRnnConfig):
        super().__init__(config)
        heads, width = config.num_heads, config.head_width
        gates, states = CELLS[self.cell]
        self.recurrent_weight = nn.Parameter(torch.empty(heads, gates, width, width).uniform_(-1, 1) * width**-0.5)
        self.out_proj = Linear(heads * width, config.d_model, bias=False)
        self.state_shape = (states, heads, width)

    def over_time(
        self, gates: Tensor, bias: Tensor | None, recurrent: Tensor, cu_seqlens: Boundaries
    ) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, T, H, W]`` and states, from what the input gives to the gates ``[B, T, H, gates, W]``."""
        options = {"cell": self.cell, "state": recurrent, "cu_seqlens": cu_seqlens}
        return ops.gated_rnn(gates, self.recurrent_weight, bias, **options)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        _, heads, width = self.state_shape
        return rnn_flops(length, heads, CELLS[self.cell][0], width, batch_size)


class PlainRnn(GatedRnnMixer):
    """One whose gates' inputs are a linear map of x, and whose outputs are a linear map of h."""

    takes_any_state = True

    @from_options
    def __init__(self, config: GatedRnnConfig):
        super().__init__(config)
        self.in_proj = Linear(config.d_model, self.recurrent_weight.shape[:3].numel())

    def recurrent_bias(self) -> Tensor | None:
        """What is added to what the last output gives to the gates, ``[H, gates, W]``; ``None`` for nothing."""
        return None

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        gates = self.in_proj(x).unflatten(-1, self.recurrent_weight.shape[:3])
        h, recurrent = self.over_time(gates, self.recurrent_bias(), state.recurrent, cu_seqlens)
        return self.out_proj(h.flatten(2)), RecurrentState(None, recurrent)
