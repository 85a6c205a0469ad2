"""Zamba 2's hybrid layer: a block of attention, meant to be shared, before a Mamba-2.

A pattern names it ``zamba2``, which stands for its import path: it is made of mixers that are entered by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from seqarch.layers.attention.attention import Attention
from seqarch.layers.attention.base import AttentionState
from seqarch.layers.channel.mlp import SwiGlu
from seqarch.layers.mixer import Boundaries, Device, LayerConfig, Mixer
from seqarch.layers.modules.configured import build_config, from_options
from seqarch.layers.modules.linear import Linear
from seqarch.layers.modules.norms import HeadNorm
from seqarch.layers.recurrent_mixer import RecurrentState
from seqarch.layers.state_space.mamba2 import Mamba2


@dataclass(frozen=True, kw_only=True)
class Zamba2Config(LayerConfig):
    """Options of :class:`Zamba2`.

    Attributes:
        with_input: whether the attention reads what the stack was given beside x, and so is 2 D wide, as released; the
            mixer then stands in a stack, which hands that on.
        attention: options of the attention, by default its own; ``num_heads``, say.
        mamba2: options of the Mamba-2.
        hidden: inner width of the gated MLP; by default ``4 D``.
        activation: of the gated MLP, as :class:`seqarch.layers.SwiGlu` has it.
        norm_eps: added to the mean square in the three norms.
    """

    with_input: bool = False
    attention: dict[str, Any] | None = None
    mamba2: dict[str, Any] | None = None
    hidden: int | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        _ = self.attention_config, self.mamba2_config  # raise where they are wrong

    @property
    def width(self) -> int:
        """What the attention reads."""
        return (1 + self.with_input) * self.d_model

    @property
    def attention_config(self) -> Any:
        return build_config("mixer", "attention", Attention.Config, {"d_model": self.width, **(self.attention or {})})

    @property
    def mamba2_config(self) -> Any:
        return build_config("mixer", "mamba2", Mamba2.Config, {"d_model": self.d_model, **(self.mamba2 or {})})


class Zamba2State(NamedTuple):
    """State of :class:`Zamba2`: those of its attention and of its Mamba-2."""

    attention: AttentionState
    mamba2: RecurrentState


class Zamba2(Mixer):
    """``y = mamba2(norm(x + W b))`` with ``b = mlp(norm(attention(norm([x, e]))))``, e the input of the stack.

    The block b adds to what Mamba-2 reads and not to the residual stream. It is the same at several depths: with
    ``(share=a, adapter_rank=128, adapted=[channel.in_proj])`` layers share attention, MLP and their norms, while W, the
    last norm and Mamba-2 are each layer's own. It has norms of its own, so that the stack's placement is ``"none"``.
    Glorioso et al. 2024, "The Zamba2 Suite", section 2, as released. Initialisation is that of the parts.
    """

    Config = Zamba2Config
    unshared: ClassVar[tuple[str, ...]] = ("after", "mamba2_norm", "mamba2")

    @from_options
    def __init__(self, config: Zamba2Config):
        super().__init__(config)
        width, eps = config.d_model, config.norm_eps
        self.takes = ("input",) if config.with_input else ()
        self.attention_norm = HeadNorm(config.width, eps)
        self.attention = Attention(config.attention_config)
        if config.with_input:
            read = self.attention.out_proj
            self.attention.out_proj = Linear(read.in_features, width, bias=read.bias is not None)
        self.channel_norm = HeadNorm(width, eps)
        hidden = 4 * width if config.hidden is None else config.hidden
        self.channel = SwiGlu(d_model=width, hidden=hidden, activation=config.activation)
        self.after = Linear(width, width, bias=False)
        self.mamba2_norm = HeadNorm(width, eps)
        self.mamba2 = Mamba2(config.mamba2_config)

    def mix(self, x: Tensor, state: Zamba2State, cu_seqlens: Boundaries) -> tuple[Tensor, Zamba2State]:
        return self._mix(x, x, state, cu_seqlens)

    def exchange(
        self, x: Tensor, state: Zamba2State, cu_seqlens: Boundaries, taken: Mapping[str, Any]
    ) -> tuple[Tensor, Zamba2State, Mapping[str, Any]]:
        read = torch.cat([x, taken["input"]], dim=-1) if self.takes else x
        return *self._mix(x, read, state, cu_seqlens), {}

    def _mix(self, x: Tensor, read: Tensor, state: Zamba2State, cu_seqlens: Boundaries) -> tuple[Tensor, Zamba2State]:
        o, attention = self.attention(self.attention_norm(read), state.attention, cu_seqlens)
        block = self.after(self.channel(self.channel_norm(o)))
        y, mamba2 = self.mamba2(self.mamba2_norm(x + block), state.mamba2, cu_seqlens)
        return y, Zamba2State(attention, mamba2)

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> Zamba2State:
        make = (batch_size, max_length, device, dtype)
        return Zamba2State(self.attention.new_state(*make), self.mamba2.new_state(*make))

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        return self.attention.state_bytes(length, batch_size) + self.mamba2.state_bytes(length, batch_size)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return sum(each.sequence_flops(length, batch_size) for each in (self.attention, self.mamba2))
