"""sLSTM: an LSTM with exponential gates, a normaliser, and memory that is mixed within heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers.mixer import Boundaries
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.short_conv import ShortConvolution
from seqarch.layers.recurrent.gated_rnn import GatedRnnConfig, GatedRnnMixer
from seqarch.layers.recurrent_mixer import RecurrentState


@dataclass(frozen=True, kw_only=True)
class SlstmConfig(GatedRnnConfig):
    """Options of :class:`Slstm`.

    Attributes:
        num_heads: H; memory is mixed within heads alone.
        conv_width: width of a short convolution with SiLU before the input and forget gates; 0 for none.
        forget_power: the biases of forget gates go at first from 5 to -7 over a head's channels, as 5 - 12 u to this
            power for u from 0 to 1; larger forgets more slowly. Released are .3 in the first layer to 1.6 in the last.
        recurrent_std: deviation of the normal numbers with which R begins; 0, as released, for zeros.
        norm_eps: added to the variance in the norm of h.
    """

    may_be_zero: ClassVar[tuple[str, ...]] = ("conv_width", "recurrent_std")

    slow_gates: ClassVar[dict[str, float]] = {"forget_power": 4.0}

    num_heads: int = 4
    conv_width: int = 4
    forget_power: float = 0.95
    recurrent_std: float = 0.0
    norm_eps: float = 1e-5


class Slstm(GatedRnnMixer):
    """``c_t = f_t c_{t-1} + e^{i_t} tanh(z_t)``, ``n_t = f_t n_{t-1} + e^{i_t}``, ``h_t = sigmoid(o_t) c_t / n_t``.

    z, i, f and o are ``W x_t + R h_{t-1} + b``, of which f goes through a sigmoid, i and f see x through a short
    convolution, and R is a matrix of each head; c and n are held times ``exp(-m_t)`` with
    ``m_t = max(log f_t + m_{t-1}, i_t)``, which leaves h as it is. Beck et al. 2024, "xLSTM: Extended Long
    Short-Term Memory", section 2.2, eq. 8-17, in the layout of its figure 10: ``W_o norm(h)`` with a layer norm of each
    head. Not mLSTM, whose state is a matrix and whose gates do not see the last output, so that it has a form in
    chunks: this one has none, token follows token. Departures from the release: W are full matrices, there one of each
    head, and there is an output projection, as a stack may have no channel mixer to bring the heads together. R is 0 at
    first, b by ``forget_power`` and else 0, as released; W have ``nn.Linear``'s initialisation.
    """

    Config = SlstmConfig
    cell = "slstm"
    no_weight_decay = ("bias",)  # vectors, one for each head and gate
    unquantized = ("gates",)

    @from_options
    def __init__(self, config: SlstmConfig):
        super().__init__(config)
        heads, width = config.num_heads, config.head_width
        nn.init.normal_(self.recurrent_weight, std=config.recurrent_std)
        self.conv = ShortConvolution(config.d_model, config.conv_width, "silu") if config.conv_width else None
        self.in_proj = Linear(config.d_model, 2 * heads * width, bias=False)
        self.gates = Linear(config.d_model, 2 * heads * width, bias=False)
        bias = torch.zeros(heads, 4, width)
        bias[:, 2] = 5 - 12 * torch.linspace(0, 1, width) ** config.forget_power
        self.bias = nn.Parameter(bias)
        self.norm_weight = nn.Parameter(torch.ones(heads * width))

    def mix(self, x: Tensor, state: RecurrentState, cu_seqlens: Boundaries) -> tuple[Tensor, RecurrentState]:
        (u, conv) = (x, None) if self.conv is None else self.conv(x, state.conv, cu_seqlens)
        heads, width = self.config.num_heads, self.config.head_width
        outer, inner = (each.unflatten(-1, (heads, 2, width)) for each in (self.in_proj(x), self.gates(u)))
        gates = torch.cat([outer[..., :1, :], inner, outer[..., 1:, :]], dim=3)  # z, i, f, o
        h, recurrent = self.over_time(gates, self.bias, state.recurrent, cu_seqlens)
        h = F.layer_norm(h, h.shape[-1:], eps=self.config.norm_eps).flatten(2) * self.norm_weight.to(h.dtype)
        return self.out_proj(h), RecurrentState(conv, recurrent)
