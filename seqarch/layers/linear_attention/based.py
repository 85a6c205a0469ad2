"""Based: linear attention by a Taylor series of the exponential, beside a small window of exact attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from seqarch.layers.attention.attention import SlidingWindow, SlidingWindowConfig
from seqarch.layers.attention.base import AttentionState
from seqarch.layers.linear_attention.linear_attention import LinearAttention, LinearAttentionConfig
from seqarch.layers.mixer import Boundaries, Device, Mixer
from seqarch.layers.modules.configured import from_options
from seqarch.layers.modules.head_maps import HeadMap
from seqarch.layers.modules.heads import HeadsConfig
from seqarch.layers.recurrent_mixer import RecurrentState


@dataclass(frozen=True, kw_only=True)
class BasedConfig(HeadsConfig):
    """Options of :class:`Based`.

    Attributes:
        key_width: width of the linear part's queries and keys; its state has ``(K + 1) (K + 2) / 2`` rows per head.
        window: tokens that each token sees exactly, itself included.
    """

    size_options: ClassVar[dict[str, str]] = {"key_width": "key_width", "window": "window"}

    key_width: int = 16
    window: int = 64


class BasedState(NamedTuple):
    """State of :class:`Based`.

    Attributes:
        linear: the linear part's state, ``[B, H, (K + 1) (K + 2) / 2, V + 1]``.
        window: the window's keys and values.
    """

    linear: RecurrentState
    window: AttentionState


class Based(Mixer):
    """``y = linear(x) + window(x)``: a global and a local part, each with projections of its own.

    ``linear`` is normalised linear attention whose kernel ``1 + s + s^2 / 2``, ``s = q_t . k_s / sqrt(K)``, stands for
    ``exp(s)``, on narrow queries and keys; ``window`` is sliding-window attention with rotary positions. Arora et al.
    2024, "Simple linear attention language models balance the recall-throughput tradeoff", section 4. The paper puts
    the two in layers of their own; here one mixer holds both, so its state has keys and values too, and
    ``linear_attention`` and ``sliding_window`` in a pattern give the paper's arrangement. The features hold each pair
    of channels once, 153 in place of the paper's 273, with the same products. Projections have ``nn.Linear``'s
    initialisation.
    """

    Config = BasedConfig

    @from_options
    def __init__(self, config: BasedConfig):
        super().__init__(config)
        width, heads = config.d_model, config.num_heads
        self.linear = LinearAttention(
            LinearAttentionConfig(d_model=width, num_heads=heads, key_width=config.key_width, feature_map="taylor")
        )
        self.window = SlidingWindow(SlidingWindowConfig(d_model=width, num_heads=heads, window=config.window))

    def head_maps(self) -> list[HeadMap]:
        linear = [each.within("linear") for each in self.linear.head_maps() if each.role in "vo"]  # q and k are narrow
        return [*(each.within("window") for each in self.window.head_maps()), *linear]

    def mix(self, x: Tensor, state: BasedState, cu_seqlens: Boundaries) -> tuple[Tensor, BasedState]:
        # the window is exact where precision counts most, the linear part reaches all that is before it
        distant, linear = self.linear(x, state.linear, cu_seqlens)
        near, window = self.window(x, state.window, cu_seqlens)
        return distant + near, BasedState(linear, window)

    def new_state(self, batch_size: int, max_length: int, device: Device, dtype: torch.dtype | None) -> BasedState:
        linear = self.linear.new_state(batch_size, max_length, device, dtype)
        window = self.window.new_state(batch_size, max_length, device, dtype)
        return BasedState(linear, window)

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        return self.linear.state_bytes(length, batch_size) + self.window.state_bytes(length, batch_size)

    def sequence_flops(self, length: int, batch_size: int = 1) -> int:
        return self.linear.sequence_flops(length, batch_size) + self.window.sequence_flops(length, batch_size)
