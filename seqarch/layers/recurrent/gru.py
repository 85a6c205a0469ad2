"""GRU, the gated recurrent unit, as a mixer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqarch.layers.modules.configured import from_options
from seqarch.layers.recurrent.gated_rnn import GatedRnnConfig, PlainRnn


@dataclass(frozen=True, kw_only=True)
class GruConfig(GatedRnnConfig):
    """Options of :class:`Gru`."""


class Gru(PlainRnn):
    """``h_t = (1 - z_t) n_t + z_t h_{t-1}``, ``n_t = tanh(W_n x_t + b_n + r_t (R_n h_{t-1} + c_n))``.

    ``r`` and ``z`` are sigmoids of ``W x_t + R h_{t-1} + b``; the output is ``W_o h_t``. Cho et al. 2014, "Learning
    Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation", with the reset gate after the
    matrix, as in ``torch.nn.GRU``. Not min_gru, whose gate and candidate do not see ``h_{t-1}`` so that it has a form
    in parallel: this one has none, token follows token. With one head R is full; with several, block-diagonal. ``c_n``
    is 0 at first, R uniform in ``+-1 / sqrt(W)``, other maps have ``nn.Linear``'s initialisation.
    """

    Config = GruConfig
    cell = "gru"
    no_weight_decay = ("candidate_bias",)  # a vector, one for each head

    @from_options
    def __init__(self, config: GruConfig):
        super().__init__(config)
        self.candidate_bias = nn.Parameter(torch.zeros(config.num_heads, 1, config.head_width))

    def recurrent_bias(self) -> Tensor:
        none = torch.zeros_like(self.candidate_bias)
        return torch.cat([none, none, self.candidate_bias], dim=1)
