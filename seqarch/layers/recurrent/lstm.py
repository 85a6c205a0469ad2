"""LSTM, the long short-term memory, as a mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from seqarch.layers.modules.configured import from_options
from seqarch.layers.recurrent.gated_rnn import GatedRnnConfig, PlainRnn


@dataclass(frozen=True, kw_only=True)
class LstmConfig(GatedRnnConfig):
    """Options of :class:`Lstm`.

    Attributes:
        forget_bias: the bias of the forget gates' logits at first.
    """

    slow_gates: ClassVar[dict[str, float]] = {"forget_bias": 5.0}

    may_be_zero: ClassVar[tuple[str, ...]] = ("forget_bias",)

    forget_bias: float = 1.0


class Lstm(PlainRnn):
    """``c_t = f_t c_{t-1} + i_t tanh(g_t)``, ``h_t = o_t tanh(c_t)``; gates ``sigmoid(W x_t + R h_{t-1} + b)``.

    Hochreiter and Schmidhuber 1997, "Long Short-Term Memory", with the forget gate of Gers et al. 2000, as in
    ``torch.nn.LSTM`` and without peepholes; the output is ``W_o h_t``. Not sLSTM or mLSTM, whose gates are exponential,
    nor min_gru, whose gates do not see ``h_{t-1}`` so that it has a form in parallel: this one has none, token follows
    token. With one head R is full; with several, block-diagonal. Biases are 0 at first but that of the forget gate, 1
    as in Jozefowicz et al. 2015; R is uniform in ``+-1 / sqrt(W)``, other maps have ``nn.Linear``'s initialisation.
    """

    Config = LstmConfig
    cell = "lstm"

    @from_options
    def __init__(self, config: LstmConfig):
        super().__init__(config)
        bias = torch.zeros(self.recurrent_weight.shape[:3])
        bias[:, 1] = config.forget_bias
        self.in_proj.bias = nn.Parameter(bias.flatten())
