"""mLSTM: linear attention with exponential gates, stabilised and normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch import ops
from seqarch.layers.mixer import Boundaries, Device, LayerConfig
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadProjection
from seqarch.layers.modules.linear import Linear
from seqarch.layers.recurrent_mixer import LinearMixer
from seqarch.ops.chunked.packing import over_sequences
from seqarch.ops.dispatch.checks import unknown_name

FORGET_GATES = ("sigmoid", "exponential")


@dataclass(frozen=True, kw_only=True)
class MlstmConfig(LayerConfig):
    """Options of :class:`Mlstm`.

    Attributes:
        num_heads: H.
        expand_k: all heads together have ``expand_k D`` key dimensions, and D values; 1 in the paper.
        key_width, value_width: K and V, of one head, in place of ``expand_k`` and of D values in all.
        forget_gate: ``"sigmoid"`` or ``"exponential"``, of the gate's logit.
        forget_min, forget_max: the initial forget gates are sigmoids of numbers from the one to the other, over the
            heads; larger forgets more slowly.
        gate_cap: c in ``c tanh(x / c)`` over the gates' logits; 0, as in the paper, for none.
        conv_width: width of a short convolution with SiLU over queries, keys and values; 0 for none.
        norm_eps: added to the variance in the norm of h.
        denominator_eps: added to the denominator of h times ``exp(-m)``, so that h depends on m; 1e-6 in the release
            of xLSTM 7B, 0 in the paper.
    """

    may_be_zero: ClassVar[tuple[str, ...]] = ("conv_width", "gate_cap", "denominator_eps")

    size_options: ClassVar[dict[str, str]] = {"num_heads": "num_heads", "key_width": "keys", "value_width": "values"}

    head_options: ClassVar[dict[str, str]] = {"num_heads": "heads", "key_width": "keys", "value_width": "values"}

    slow_gates: ClassVar[dict[str, float]] = {"forget_min": 6.0, "forget_max": 9.0}

    num_heads: int = 4
    expand_k: float = 0.5
    key_width: int | None = None
    value_width: int | None = None
    forget_gate: str = "sigmoid"
    forget_min: float = 3.0
    forget_max: float = 6.0
    gate_cap: float = 15.0
    conv_width: int = 0
    norm_eps: float = 1e-6
    denominator_eps: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.forget_gate not in FORGET_GATES:
            raise unknown_name("forget_gate", self.forget_gate, FORGET_GATES)
        shared = self.expand_k * self.d_model
        widths = ("d_model", self.d_model, self.value_width), ("expand_k * d_model", shared, self.key_width)
        for name, width, given in widths:
            if given is None and width % self.num_heads:
                raise ValueError(f"num_heads ({self.num_heads}) must divide {name} ({width:g})")

    @property
    def keys(self) -> int:
        """K."""
        return self.key_width or int(self.expand_k * self.d_model) // self.num_heads

    @property
    def values(self) -> int:
        """V."""
        return self.value_width or self.d_model // self.num_heads


class MlstmState(NamedTuple):
    """State of :class:`Mlstm`.

    Attributes:
        conv: the short convolution's last inputs, or ``None`` without one.
        recurrent: ``[B, H, K, V + 1]``, both C and, as the last value channel, n; scaled by ``exp(-stabiliser)``.
        stabiliser: m, ``[B, H]``.
    """

    conv: Tensor | None
    recurrent: Tensor
    stabiliser: Tensor


class Mlstm(LinearMixer):
    """``C_t = f_t C_{t-1} + i_t k_t^T v_t``, ``n_t = f_t n_{t-1} + i_t k_t``, ``h_t = q_t C_t / max(|q_t n_t|, 1)``.

    ``i = exp(W_i x + b_i)``, ``f`` the sigmoid or exponential of ``W_f x + b_f``, ``q_t`` scaled by ``1 / sqrt(K)``;
    the output is ``norm(h) sigmoid(W_o x)``. Everything is held times ``exp(-m_t)`` with ``m_t = max(log f_t + m_{t-1},
    log i_t)``, which leaves h as it is. Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", eq. 19-27, in the
    layout of Beck et al. 2025 ("xLSTM 7B"): no projection up and no skip around the cell, narrower keys, capped gates.
    Not GLA: one decay per head, and inputs that may outweigh all before them. The release adds 1e-6 to the scaled
    denominator, so that its h depends on m; here nothing is added by default. Gates start without weights and with
    ``b_i`` normal with 0.1, ``b_f`` by default from 3 to 6 over the heads, as released with the paper (an exponential
    gate starts at the same f).
    """

    Config = MlstmConfig
    unquantized = ("gates",)

    @from_options
    def __init__(self, config: MlstmConfig):
        super().__init__(config)
        heads, keys, values = config.num_heads, config.keys, config.values
        parts = [(heads, keys), (heads, keys), (heads, values)]
        self.qkv_proj = HeadProjection(config.d_model, parts, config.conv_width, "silu" if config.conv_width else None)
        self.gates = Linear(config.d_model, 2 * heads)
        nn.init.zeros_(self.gates.weight)
        forget = torch.linspace(config.forget_min, config.forget_max, heads)
        forget = forget if config.forget_gate == "sigmoid" else F.logsigmoid(forget)
        self.gates.bias = nn.Parameter(torch.cat([torch.randn(heads) * 0.1, forget]))
        self.norm_weight = nn.Parameter(torch.ones(heads * values))
        self.gate = Linear(config.d_model, heads * values, bias=False)
        self.out_proj = Linear(heads * values, config.d_model, bias=False)
        self.state_shape = (heads, keys, values + 1)

    def head_maps(self) -> list[HeadMap]:
        config = self.config
        return [*self.qkv_proj.head_maps("qkv_proj"), HeadMap("o", "out_proj", config.num_heads, config.values)]

    def mix(self, x: Tensor, state: MlstmState, cu_seqlens: Boundaries) -> tuple[Tensor, MlstmState]:
        conv, recurrent, m = state
        (q, k, v), conv = self.qkv_proj(x, conv, cu_seqlens)
        # exponential gates, held relative to the running maximum m so that none exceeds 1
        log_i, log_f = self._log_gates(x)
        gates, m = over_sequences(_stabilise, cu_seqlens, m, log_i, log_f)
        log_decay, log_write, floor = gates.unbind(-1)
        # the normaliser n is one more value channel, written as 1
        k = k * log_write.exp().unsqueeze(-1).to(k.dtype)
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        o, recurrent = ops.linear_attention(q, k, v, log_decay, state=recurrent, cu_seqlens=cu_seqlens)
        # h = C q / max(|n q|, 1), of which 1 is exp(-m) here; then norm per head and output gate
        denominator = torch.maximum(o[..., -1:].abs(), floor.exp().unsqueeze(-1).to(o.dtype))
        h = o[..., :-1] / (denominator + self.config.denominator_eps)
        h = rearrange(F.layer_norm(h, h.shape[-1:], eps=self.config.norm_eps), "b t h v -> b t (h v)")
        h = h * self.norm_weight.to(h.dtype) * self.gate(x).sigmoid()
        return self.out_proj(h), MlstmState(conv, recurrent, m)

    def _log_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``log i`` and ``log f``, ``[B, T, H]`` each."""
        logits, cap = self.gates(x).to(self.state_dtype), self.config.gate_cap
        logits = cap * torch.tanh(logits / cap) if cap else logits
        log_i, log_f = logits.chunk(2, dim=-1)
        return log_i, F.logsigmoid(log_f) if self.config.forget_gate == "sigmoid" else log_f

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> MlstmState:
        conv, recurrent = super().new_state(batch_size, max_length, device, dtype)
        return MlstmState(conv, recurrent, recurrent.new_zeros(batch_size, self.config.num_heads))


def _stabilise(m: Tensor, log_i: Tensor, log_f: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence of m as a scan, and the gates relative to it.

    With F the sum of the log forget gates, ``m_t - F_t`` is the running maximum of ``m_0`` and ``log i_s - F_s``. It
    never falls, so no gate exceeds 1, and as the differences are taken against F nothing cancels.

    Args:
        m: ``[B, H]`` before the first token.
        log_i, log_f: ``[B, T, H]``.

    Returns:
        ``[B, T, H, 3]``: the log of the decay, that of what keys are multiplied by, ``-m`` held within what the
        exponential can represent; and the last m.
    """
    forgotten = log_f.double().cumsum(1)
    inputs = log_i - forgotten
    highest = torch.cat([m.double().unsqueeze(1), inputs], dim=1).cummax(1).values
    before, now = highest[:, :-1], highest[:, 1:]
    after = torch.cat([m.double().unsqueeze(1), forgotten + now], dim=1)
    gates = torch.stack([before - now, inputs - now, (-after[:, 1:]).clamp(-80, 80)], dim=-1)
    return gates.to(m.dtype), after[:, -1].to(m.dtype)
