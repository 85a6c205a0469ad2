"""Channel mixers: what each token does with its own channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from seqarch.layers.mixer import ChannelMixer, LayerConfig, linear_flops
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.linear import Linear
from seqarch.ops.dispatch.checks import unknown_name
from seqarch.ops.experts.activations import ACTIVATIONS, gated_unit
from seqarch.ops.native import fused


def round_up(width: float, multiple: int = 32) -> int:
    """The least positive multiple that is not below ``width``, rounding errors of ``8 / 3 * D`` aside."""
    return max(1, math.ceil(round(width / multiple, 6))) * multiple


@dataclass(frozen=True, kw_only=True)
class HiddenConfig(LayerConfig):
    """Options of the inner width and the activation.

    Attributes:
        hidden: the inner width F.
        expansion: where ``hidden`` is not given, F is ``expansion * D``, rounded up to a multiple of 32.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"quick_gelu"``, ``"relu"``, ``"silu"`` or
            ``"squared_relu"``.
    """

    size_options: ClassVar[dict[str, str]] = {"hidden": "hidden_width"}

    hidden: int | None = None
    expansion: float = 4.0
    activation: str = "gelu"

    def __post_init__(self):
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)

    @property
    def hidden_width(self) -> int:
        return round_up(self.expansion * self.d_model) if self.hidden is None else self.hidden


@dataclass(frozen=True, kw_only=True)
class MlpConfig(HiddenConfig):
    """Options of :class:`Mlp`.

    Attributes:
        bias: whether both linear maps have a bias.
    """

    bias: bool = False


class Mlp(ChannelMixer):
    """``y = act(x W_in) W_out``, the feed-forward layer of the Transformer (Vaswani et al. 2017, "Attention Is All You
    Need", section 3.3).

    GELU as in GPT (Radford et al. 2018) in place of ReLU; no biases, unlike both, unless asked for. ``nn.Linear``'s
    initialisation.
    """

    Config = MlpConfig

    @from_options
    def __init__(self, config: MlpConfig):
        super().__init__(config)
        self.in_proj = Linear(config.d_model, config.hidden_width, bias=config.bias)
        self.out_proj = Linear(config.hidden_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(ACTIVATIONS[self.config.activation](self.in_proj(x)))

    def flops(self, length: int, batch_size: int = 1) -> int:
        return sum(linear_flops(linear, batch_size * length) for linear in (self.in_proj, self.out_proj))


@dataclass(frozen=True, kw_only=True)
class SwiGluConfig(HiddenConfig):
    """Options of :class:`SwiGlu`, whose ``8 / 3`` times D inside have the parameters of an MLP of ``4 D``.

    Attributes:
        bias: whether each of the three linear maps has a bias.
        gate_factor: multiplies the gate before its activation (Falcon-H1).
        limit: bounds the gate from above and the value on either side before the activation; ``None`` for no bound.
        value_offset: added to the value before it is gated.
    """

    may_be_zero = ("value_offset",)

    expansion: float = 8 / 3
    activation: str = "silu"
    bias: bool = False
    gate_factor: float = 1.0
    limit: float | None = None
    value_offset: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether it is ``act(gate) value`` and nothing more."""
        return self.gate_factor == 1 and self.limit is None and not self.value_offset


class SwiGlu(ChannelMixer):
    """``y = (silu(x W_gate) * (x W_in)) W_out`` (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6).

    One matrix holds both ``W_gate`` (first) and ``W_in``; no biases, as in the paper, unless asked for. Another
    ``activation`` makes it another gated unit of the paper, ``"gelu"`` GEGLU. ``nn.Linear``'s initialisation.
    """

    Config = SwiGluConfig

    @from_options
    def __init__(self, config: SwiGluConfig):
        super().__init__(config)
        self.in_proj = Linear(config.d_model, 2 * config.hidden_width, bias=config.bias)
        self.out_proj = Linear(config.hidden_width, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        config, both = self.config, self.in_proj(x)
        if config.activation == "silu" and config.is_plain and fused.serves(both):
            return self.out_proj(fused.swiglu(both))
        gate, value = both.chunk(2, dim=-1)
        gate = gate if config.gate_factor == 1 else config.gate_factor * gate
        return self.out_proj(gated_unit(config.activation, gate, value, config.limit or 0.0, config.value_offset))

    def flops(self, length: int, batch_size: int = 1) -> int:
        return sum(linear_flops(linear, batch_size * length) for linear in (self.in_proj, self.out_proj))
